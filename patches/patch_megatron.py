#!/usr/bin/env python3
"""Teaches pretrain_gpt.py of a Megatron-LM checkout --moe-backend xmoe and X-MoE's other options, in three lines.

The lines are inserted before two statements of the script (the anchors) and end in `# megatron_xmoe`, by which --undo
finds them again: what it leaves is the file as it was. A second call changes nothing. The diff goes to standard output.
"""

import argparse
import difflib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from command_line import OneLineErrorParser, UserError, finished_files, run_tool  # noqa: E402

PROG = "patch_megatron.py"
SCRIPT = "pretrain_gpt.py"
KNOWN = ("0.19",)  # releases of Megatron-Core whose script has these anchors, and with which X-MoE is tested
MARK = "  # megatron_xmoe"


@dataclass(frozen=True)
class Insertion:
    """Lines that go before a statement."""

    name: str
    anchor: str
    """How the statement begins, without its indentation."""

    lines: tuple[str, ...]


INSERTIONS = (
    Insertion(
        "the parsing of the arguments",
        "args = parse_and_validate_args(",
        (
            "from megatron_xmoe.training.stock import use_moe_backend, with_xmoe_options",
            "parse_and_validate_args = with_xmoe_options(parse_and_validate_args)",
        ),
    ),
    Insertion(
        "the model's configuration",
        "full_config = pretrain_cfg_container_from_args(args, model_cfg)",
        ("use_moe_backend(model_cfg)",),
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Patch, check or undo; returns the exit code."""
    parser = OneLineErrorParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Example: python patches/{PROG} ~/Megatron-LM",
    )  # fmt: skip
    parser.add_argument("checkout", type=Path, help="folder of the Megatron-LM checkout")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--check", action="store_true",
                       help="change nothing: exit code 0 if the script is patched, 1 if it can be")  # fmt: skip
    which.add_argument("--undo", action="store_true", help="take the lines out again (default: insert them)")
    options = parser.parse_args(argv)
    path = options.checkout / SCRIPT
    before = read(path)
    if options.undo:
        after = without_lines(before)
    else:
        check_version(options.checkout)
        after = with_lines(before, path)
    done = "not patched" if options.undo else "patched"
    if after == before:
        print(f"{path} is {'' if options.undo else 'already '}{done}; nothing to do", file=sys.stderr)
        return 0
    print("".join(diff(before, after)), end="")
    if options.check:
        print(f"{path} can be patched: {PROG} {options.checkout} inserts these lines", file=sys.stderr)
        return 1
    write(path, after)
    print(f"{path} is {done}", file=sys.stderr)
    return 0


def check_version(checkout: Path) -> None:
    """Raises UserError for a release that is not known."""
    path = checkout / "megatron" / "core" / "package_info.py"
    parts = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)$", read(path), re.MULTILINE))
    if len(parts) < 3:
        raise UserError(f"{path} does not say which version it is. Fix: give a checkout of Megatron-LM")
    version = f"{parts['MAJOR']}.{parts['MINOR']}"
    if version not in KNOWN:
        raise UserError(
            f"{checkout} is Megatron-Core {version}.{parts['PATCH']}; known are the releases {', '.join(KNOWN)}. Fix: "
            "check one of them out (for example core_v0.19.0), or start pretrain_xmoe.py"
        )


def with_lines(text: str, path: Path) -> str:
    """The script with the lines, whether it had them (or those of another version) before or not.

    Raises:
        UserError: an anchor is missing, or there are several.
    """
    lines = without_lines(text).splitlines(keepends=True)
    for insertion in INSERTIONS:
        places = [i for i, line in enumerate(lines) if line.lstrip(" \t").startswith(insertion.anchor)]
        if len(places) != 1:
            raise UserError(
                f"{path} has {len(places)} statements `{insertion.anchor}` ({insertion.name}); it must have one. Fix: "
                "use the script as Megatron-LM has it, or insert the lines by hand (patches/README.md)"
            )
        place = places[0]
        anchor = lines[place]
        indentation = anchor[: len(anchor) - len(anchor.lstrip(" \t"))]
        ending = anchor[len(anchor.rstrip("\r\n")) :]
        lines[place:place] = [f"{indentation}{line}{MARK}{ending}" for line in insertion.lines]
    return "".join(lines)


def without_lines(text: str) -> str:
    """The script without any line of ours."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.rstrip("\r\n").endswith(MARK))


def diff(before: str, after: str) -> list[str]:
    """Unified diff of the script."""
    sides = (text.splitlines(keepends=True) for text in (before, after))
    return list(difflib.unified_diff(*sides, f"a/{SCRIPT}", f"b/{SCRIPT}"))


def read(path: Path) -> str:
    """A file's text with its line endings; raises UserError if it is not there."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}). Fix: give the folder of a Megatron-LM checkout") from error


def write(path: Path, text: str) -> None:
    """Replace a file by a new text, whole, with its permissions."""
    with finished_files(str(path)) as (unfinished,):
        Path(unfinished).write_bytes(text.encode())
        os.chmod(unfinished, path.stat().st_mode)


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
