"""Runs a program's --help and prints what its parser knows as a line of JSON: text, options, what was loaded."""

import argparse
import json
import runpy
import sys
from pathlib import Path

HEAVY = ("torch", "megatron", "transformers", "matplotlib")


def described(parser: argparse.ArgumentParser) -> dict:
    """The text of a parser, its options, and the parsers of its commands."""
    formatter, options, commands = parser._get_formatter(), [], {}
    groups = {id(action): group.title for group in parser._action_groups for action in group._group_actions}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = {name: described(child) for name, child in action.choices.items()}
        elif not isinstance(action, argparse._HelpAction):
            options.append(described_option(action, formatter) | {"group": groups[id(action)]})
    return {"text": parser.format_help(), "options": options, "commands": commands}


def described_option(action: argparse.Action, formatter: argparse.HelpFormatter) -> dict:
    """What a test asks of one option; a flag needs no default, and neither does what must be given."""
    needs_default = action.nargs != 0 and not action.required
    return {
        "name": action.option_strings[-1] if action.option_strings else action.dest,
        "help": formatter._expand_help(action) if action.help not in (None, argparse.SUPPRESS) else "",
        "needs_default": needs_default and (bool(action.option_strings) or action.nargs in ("?", "*")),
        "default": "" if action.default in (None, argparse.SUPPRESS) or action.nargs == "*" else str(action.default),
    }


def print_help(self: argparse.ArgumentParser, file=None) -> None:
    """Takes the place of argparse's."""
    print(json.dumps(described(self) | {"loaded": [name for name in HEAVY if name in sys.modules]}))


if __name__ == "__main__":
    argparse.ArgumentParser.print_help = print_help
    sys.argv = [sys.argv[1], "--help"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
