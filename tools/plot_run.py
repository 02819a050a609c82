#!/usr/bin/env python3
"""Draws what a training run did: the loss over iterations, and how evenly the experts were used.

The losses come from the TensorBoard events that Megatron writes (--tensorboard-dir), the experts' load from the
file that `--moe-backend xmoe` writes with --xmoe-expert-load-file. Runs that stopped and went on are drawn as one;
what a restart computed again replaces what was there before. The figures are printed as well.

  python tools/plot_run.py --tensorboard-dir runs/a/tensorboard --output a.png
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from command_line import OneLineErrorParser, UserError, finished_files, run_tool

PROG = "tools/plot_run.py"
INCHES, DOTS_PER_INCH = (14, 6), 100
TRAINING, VALIDATION, BALANCE = "#1f4e9c", "#d1495b", "RdBu_r"
LOSSES_AFTER = 10  # iterations whose mean is "the loss after"
SMOOTHED = 0.02  # half the window of the smooth curve, as a share of the iterations
MAX_TICKS = 16
MAX_CELLS = 64  # in a row, to be drawn with gaps between them


@dataclass
class Curves:
    """Losses by iteration, over all starts of the run, and the iterations at which it went on."""

    training: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)

    def add_session(self, training: dict[int, float], validation: dict[int, float]) -> None:
        """Append what one process wrote; iterations that it computed again replace the older ones."""
        if not training:
            return
        first = min(training)
        for mine, new in ((self.training, training), (self.validation, validation)):
            for iteration in [i for i in mine if i >= first]:
                del mine[iteration]
            mine.update(new)
        self.resumed = [i for i in self.resumed if i < first - 1]
        if first > 1:
            self.resumed.append(first - 1)


def read_losses(directory: Path, tag: str) -> Curves:
    """Read all event files of a directory; each start of the training wrote one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sessions = []
    for path in directory.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        tags = events.Tags()["scalars"]
        first_time = events.FirstEventTimestamp() if tags else 0.0
        sessions.append(
            (first_time, *(_by_iteration(events, tags, name) for name in (tag, f"{tag} validation")))
        )
    curves = Curves()
    for _, training, validation in sorted(sessions, key=lambda session: session[0]):
        curves.add_session(training, validation)
    if not curves.training:
        raise UserError(f"--tensorboard-dir {directory} has no events with '{tag}': give the folder of a training run")
    return curves


def _by_iteration(events, tags: list[str], tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)} if tag in tags else {}


def read_expert_load(path: Path) -> dict[int, dict[int, list[int]]]:
    """Read {iteration: {layer: routes of each expert}}; where an iteration stands twice, the later line counts."""
    loads = {}
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            loads[int(record["iteration"])] = {int(k): list(v) for k, v in record["layers"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):  # the run was killed while it wrote
                continue
            raise UserError(f"{path}:{number}: not a line of --xmoe-expert-load-file ({error!r})") from None
    loads = {iteration: layers for iteration, layers in sorted(loads.items()) if layers}
    if not loads:
        raise UserError(f"--expert-load {path} has no counts: train with --xmoe-expert-load-file {path}")
    for iteration, layers in loads.items():
        if len({len(counts) for counts in layers.values()}) != 1 or not all(map(sum, layers.values())):
            raise UserError(f"{path}: iteration {iteration} has layers without routes or of different size")
    return loads


def relative_load(counts: list[int]) -> list[float]:
    """Each expert's routes, divided by the even share."""
    even = sum(counts) / len(counts)
    return [count / even for count in counts]


def busiest(layers: dict[int, list[int]]) -> float:
    """The highest relative load of any expert in any layer."""
    return max(max(relative_load(counts)) for counts in layers.values())


def summary(curves: Curves, loads: dict[int, dict[int, list[int]]] | None) -> list[str]:
    """Lines of text with the loss before and after, and the busiest expert before and after."""
    iterations = sorted(curves.training)
    first, last = iterations[0], iterations[-LOSSES_AFTER:]
    after = statistics.fmean(curves.training[i] for i in last)
    lines = [
        f"training loss     {curves.training[first]:.3f} at iteration {first}, "
        f"{after:.3f} at the end (mean of iterations {last[0]} to {last[-1]})"
    ]
    if curves.validation:
        before, end = min(curves.validation), max(curves.validation)
        lines.append(
            f"validation loss   {curves.validation[before]:.3f} at iteration {before}, "
            f"{curves.validation[end]:.3f} at iteration {end}"
        )
    if curves.resumed:
        lines.append(f"resumed           from the checkpoint of iteration {', '.join(map(str, curves.resumed))}")
    if loads:
        before, end = min(loads), max(loads)
        lines.append(
            f"busiest expert    {busiest(loads[before]):.1f} times the even share at iteration {before}, "
            f"{busiest(loads[end]):.1f} times at iteration {end}"
        )
    return lines


def draw(curves: Curves, loads: dict[int, dict[int, list[int]]] | None, output: Path) -> None:
    """Write the figure: the losses on the left, the experts' load (if any) on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    if loads:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        draw_load(figure, right, loads)
    else:
        left = figure.subplots()
    draw_losses(left, curves)
    with finished_files(str(output)) as [unfinished]:
        figure.savefig(unfinished, format=output.suffix.lstrip(".") or "png")


def smooth(losses: tuple[float, ...]) -> list[float]:
    """Centred running mean, over fewer iterations towards both ends so that it starts and ends at the true losses."""
    half = round(SMOOTHED * len(losses))
    reach = [min(half, i, len(losses) - 1 - i) for i in range(len(losses))]
    return [statistics.fmean(losses[i - r : i + r + 1]) for i, r in enumerate(reach)]


def draw_losses(axes, curves: Curves) -> None:
    """Training and validation loss over iterations, with a line where the run went on from a checkpoint."""
    iterations, losses = zip(*sorted(curves.training.items()), strict=True)
    axes.plot(iterations, losses, color=TRAINING, alpha=0.25, linewidth=1, label="training, each iteration")
    axes.plot(iterations, smooth(losses), color=TRAINING, linewidth=1.8, label="training, running mean")
    if curves.validation:
        points = zip(*sorted(curves.validation.items()), strict=True)
        axes.plot(*points, color=VALIDATION, marker="o", markersize=6, linewidth=1.4, label="validation")
    for number, iteration in enumerate(curves.resumed):
        label = None if number else "stopped and resumed from a checkpoint"
        axes.axvline(iteration, color="0.35", linestyle=(0, (4, 3)), linewidth=1.2, label=label)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title="Loss")
    axes.set_xlim(0, iterations[-1] * 1.02)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=1, edgecolor="white")


def draw_load(figure, axes, loads: dict[int, dict[int, list[int]]]) -> None:
    """A map of layer by expert for the last record; white is the even share, red more, blue less."""
    iteration = max(loads)
    before = max((i for i in loads if i < iteration), default=0)
    layers = loads[iteration]
    rows = [relative_load(layers[layer]) for layer in sorted(layers)]
    image = axes.imshow(rows, cmap=BALANCE, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    experts = len(rows[0])
    step = -(-experts // MAX_TICKS)
    axes.set_xticks(range(0, experts, step))
    row_step = -(-len(rows) // MAX_TICKS)
    axes.set_yticks(range(0, len(rows), row_step), [str(layer) for layer in sorted(layers)[::row_step]])
    if experts <= MAX_CELLS:
        axes.set_xticks([i - 0.5 for i in range(1, experts)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(1, len(rows))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="expert", ylabel="layer", title=f"Experts' load, iterations {before + 1} to {iteration}")
    bar = figure.colorbar(image, ax=axes, extend="max" if max(map(max, rows)) > 2 else "neither", pad=0.02)
    bar.set_label("tokens routed to the expert / even share")
    bar.outline.set_visible(False)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = OneLineErrorParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensorboard-dir", type=Path, required=True, metavar="DIR", help="events of the run")
    text = "file of --xmoe-expert-load-file (default: none)"
    parser.add_argument("--expert-load", type=Path, metavar="FILE", help=text)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png", help="figure (or .svg, .pdf)")
    parser.add_argument("--loss", default="lm loss", metavar="TAG", help="name of the loss (default: 'lm loss')")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--output {args.output} must end in .png, .svg or .pdf")
    if not args.tensorboard_dir.is_dir():
        raise UserError(f"--tensorboard-dir {args.tensorboard_dir} is not a folder: give the one of the training run")
    try:
        curves = read_losses(args.tensorboard_dir, args.loss)
        loads = read_expert_load(args.expert_load) if args.expert_load else None
        draw(curves, loads, args.output)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install matplotlib tensorboard") from None
    print("\n".join([*summary(curves, loads), f"figure            {args.output}"]))


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
