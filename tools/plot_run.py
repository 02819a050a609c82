#!/usr/bin/env python3
"""Draws what a training run did, from the TensorBoard events that Megatron writes (--tensorboard-dir).

Loss and throughput are always there; the balance of the experts, bytes by link and the all-to-alls' time come from
--moe-backend xmoe, the map of each expert's load from --xmoe-metrics layers, and the bars of the stages from
--xmoe-profile-breakdown. Runs that stopped and went on are drawn as one; what a restart computed again replaces what
was there before. The main figures are printed as well.

  python tools/plot_run.py --tensorboard-dir runs/a/tensorboard --output a.png a.html
"""

import argparse
import base64
import html
import io
import statistics
import sys
from pathlib import Path

from command_line import OneLineErrorParser, UserError, finished_files, run_tool
from run_events import Run, read_run
from run_panels import panels_of

PROG = "tools/plot_run.py"
PANEL_INCHES, DOTS_PER_INCH = (7.5, 4.8), 100
LOSSES_AFTER = 10  # iterations whose mean is "the loss after"
PICTURES, PAGES = (".png", ".svg", ".pdf"), (".html",)
STYLE = (
    "body { font-family: sans-serif; max-width: 1560px; margin: 2em auto; padding: 0 1em } "
    "figure { display: inline-block; margin: 0 0 1.5em } img { max-width: 100% } "
    "pre { background: #f4f4f4; padding: 1em }"
)


def summary(run: Run) -> list[str]:
    """Lines of text with the loss before and after, the speed, and the busiest expert before and after."""
    losses, validation = run[run.loss_tag], run[f"{run.loss_tag} validation"]
    iterations = sorted(losses)
    first, last = iterations[0], iterations[-LOSSES_AFTER:]
    lines = [
        f"training loss     {losses[first]:.3f} at iteration {first}, "
        f"{statistics.fmean(losses[i] for i in last):.3f} at the end (mean of iterations {last[0]} to {last[-1]})"
    ]
    if validation:
        before, end = min(validation), max(validation)
        steps = dict.fromkeys((before, end))
        lines.append("validation loss   " + ", ".join(f"{validation[i]:.3f} at iteration {i}" for i in steps))
    if run.resumed:
        lines.append(f"resumed           from the checkpoint of iteration {', '.join(map(str, run.resumed))}")
    if run.throughput:
        unit = "tokens" if run.sequence_length else "samples"
        lines.append(f"speed             {statistics.median(run.throughput.values()):.0f} {unit} a second (median)")
    busiest = run["xmoe/load-max-of-worst-layer"]
    if busiest:
        before, end = min(busiest), max(busiest)
        lines.append(
            f"busiest expert    {busiest[before]:.1f} times the even share at iteration {before}, "
            f"{busiest[end]:.1f} times at iteration {end}"
        )
    return lines


def draw_picture(run: Run, output: Path) -> None:
    """Write all panels into one picture."""
    from matplotlib.figure import Figure

    panels = panels_of(run)
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, (title, draw) in zip(places, panels, strict=False):
        draw(place, run)
        place.set_title(title)
    for place in places[len(panels) :]:
        place.set_axis_off()
    with finished_files(str(output)) as [unfinished]:
        figure.savefig(unfinished, format=output.suffix.lstrip("."))


def write_page(run: Run, source: Path, output: Path) -> None:
    """Write a page that holds its pictures, and needs nothing else."""
    name = html.escape(str(source))
    parts = [
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{name}</title>\n<style>{STYLE}</style>',
        f"<h1>{name}</h1>",
        f"<pre>{html.escape(chr(10).join(summary(run)))}</pre>",
        *(f"<figure>{_image(run, title, draw)}</figure>" for title, draw in panels_of(run)),
    ]
    with finished_files(str(output)) as [unfinished]:
        Path(unfinished).write_text("\n".join([*parts, "</html>", ""]), encoding="utf-8")


def _image(run: Run, title: str, draw) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    draw(axes, run)
    axes.set_title(title)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    encoded = base64.b64encode(content.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{encoded}">'


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = OneLineErrorParser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensorboard-dir", type=Path, required=True, metavar="DIR", help="events of the run")
    parser.add_argument("--output", type=Path, required=True, nargs="+", metavar="FILE",
                        help="what to write: .png, .svg, .pdf, or .html, a page that holds its pictures")  # fmt: skip
    parser.add_argument("--loss", default="lm loss", metavar="TAG", help="name of the loss (default: 'lm loss')")
    args = parser.parse_args(argv)
    for output in args.output:
        if output.suffix not in PICTURES + PAGES:
            raise UserError(f"--output {output} must end in {', '.join(PICTURES)} or {PAGES[0]}")
    if not args.tensorboard_dir.is_dir():
        raise UserError(f"--tensorboard-dir {args.tensorboard_dir} is not a folder: give the one of the training run")
    try:
        run = read_run(args.tensorboard_dir, args.loss)
        for output in args.output:
            if output.suffix in PAGES:
                write_page(run, args.tensorboard_dir, output)
            else:
                draw_picture(run, output)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install matplotlib tensorboard") from None
    print("\n".join([*summary(run), f"written           {' '.join(map(str, args.output))}"]))


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
