#!/usr/bin/env python3
"""Draws the figures of docs/algorithms.md, and prints the tables of computed numbers that are in it.

Both come from the code that the page describes: a small padding-free buffer and its routes, the rows of a small
redundancy-bypassing plan, the closed form of the redundancy and random routes beside it, shares of a sequence, and
break-even lengths of the recipes' models. Every picture also holds its data, as JSON in its description.

  python tools/draw_figures.py
"""

import argparse
import json
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]  # works without an installation, too

from command_line import OneLineErrorParser, UserError, finished_files, run_tool  # noqa: E402

PROG = "tools/draw_figures.py"
FORMATS = ("svg", "png", "pdf")
# the same bytes every time; letters stay letters
STYLE = {
    "svg.hashsalt": "megatron_xmoe",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "savefig.facecolor": "white",
}


def draw(figures: dict[str, dict], folder: Path, form: str) -> list[Path]:
    """Write each figure into `folder`, and its data with it where it is an SVG.

    Args: what figure_data.figures() returns; the format, one of FORMATS.
    """
    import matplotlib
    from figure_drawings import DRAWINGS
    from matplotlib.figure import Figure

    paths = [folder / f"{name}.{form}" for name in figures]
    with matplotlib.rc_context(STYLE), finished_files(*map(str, paths)) as unfinished:
        for (name, data), path in zip(figures.items(), unfinished, strict=True):
            drawing = DRAWINGS[name]
            figure = Figure(figsize=drawing.inches, dpi=100, layout="constrained")
            drawing.draw(figure, data)
            metadata = None
            if form == "svg":
                text = json.dumps(data, sort_keys=True)
                metadata = {"Title": drawing.title, "Description": text, "Date": None, "Creator": None}
            figure.savefig(path, format=form, metadata=metadata)
    return paths


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = OneLineErrorParser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), metavar="DIR",
                        help="folder for the pictures; it must exist (default: docs/figures)")  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0],
                        help="of the pictures (default: svg, the page's)")  # fmt: skip
    args = parser.parse_args(argv)
    if not args.output.is_dir():
        raise UserError(f"--output {args.output} is not a folder: make it first, or start this in the repository")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install matplotlib") from None
    import figure_data

    paths = draw(figure_data.figures(), args.output, args.format)
    for name, table in figure_data.tables().items():
        print(f"{name}:\n\n{table}\n")
    print(f"written: {' '.join(map(str, paths))}")


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
