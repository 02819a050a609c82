"""The command line: Megatron's own parser with one group for X-MoE, and which options the user really gave."""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import NoReturn

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args

from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.training.errors import UsageError


def add_xmoe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of XMoEConfig to a parser, as a group of their own, with their defaults in the help."""
    group = ArgumentGroupFactory(XMoEConfig).build_group(parser, title="X-MoE")
    for action in group._group_actions:
        action.help += f" (default: {'none' if action.default is None else action.default})"
    return parser


def xmoe_config_from_args(args: argparse.Namespace) -> XMoEConfig:
    """The X-MoE options in parsed arguments."""
    return XMoEConfig(**{field.name: getattr(args, field.name) for field in fields(XMoEConfig)})


def parse() -> tuple[argparse.Namespace, set[str], dict[str, object]]:
    """Parse the command line of pretrain_xmoe.py with Megatron's parser; returns what `parse_with` does."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.prog = "pretrain_xmoe.py"
        parser.description = (
            "Pretrain a GPT model, dense or Mixture-of-Experts, with Megatron-Core's training loop. Every option of "
            "Megatron's GPT pretraining is here; the group 'X-MoE' at the end is ours. Start it with torchrun, one "
            "process per GPU (or as many as you like on a machine without one)."
        )
        parser.error = _one_line_error
        _repair_help(parser)
        return add_xmoe_arguments(parser)

    return parse_with(provider)


def parse_with(
    extra_args_provider: Callable[[argparse.ArgumentParser], argparse.ArgumentParser], ignore_unknown_args: bool = False
) -> tuple[argparse.Namespace, set[str], dict[str, object]]:
    """Parse the command line with Megatron's parser and what a function adds to it.

    Returns:
        The arguments; the names (destinations) that the command line gave; every option's default.
    """
    built: list[argparse.ArgumentParser] = []

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        built.append(extra_args_provider(parser))
        return built[0]

    args = parse_args(provider, ignore_unknown_args)
    defaults = {action.dest: action.default for action in built[0]._actions}
    return args, _given(built[0], sys.argv[1:]), defaults


def _repair_help(parser: argparse.ArgumentParser) -> None:
    """Some of Megatron's help texts hold a bare %, on which argparse's --help fails."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            if action.help:
                formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


def _one_line_error(message: str) -> NoReturn:
    """Instead of argparse's own, which prints all of Megatron's 800 options before the error."""
    raise UsageError(f"{message}. Fix: pretrain_xmoe.py --help lists the options")


def _given(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """Destinations that `argv` sets, found by parsing it once more without any defaults."""
    parser = copy.copy(parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args(argv)[0]))
