"""--help of every program: each option is explained, in words of its own, with its default, and many of them are in
groups; there is an example."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from help_driver import described

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    path for folder in ("tools", "patches") for path in (ROOT / folder).glob("*.py") if "__main__" in path.read_text()
)
SHELL = sorted(path for path in (ROOT / "tools").glob("*.sh") if path.read_text().startswith("#!"))
ABOUT_DEVICES = """compile_triton.py benchmark_dispatch.py benchmark_experts.py benchmark_memory.py
    benchmark_metrics.py benchmark_ops.py""".split()  # the defaults are what torch finds
YES_OR_NO = ("True", "False")
UNGROUPED = 6  # so many options can be taken in at a glance; more of them need groups
NO_GROUP = (None, "", "options")  # the last is what argparse calls the rest


def faults(parser: dict, name: str) -> list[str]:
    """What is wrong with the options of a parser and of its commands."""
    found, seen = [], {}
    for option in parser["options"]:
        what, text = f"{name} {option['name']}", option["help"]
        if len(text) < 5:
            found.append(f"{what} has no help")
        if text in seen:
            found.append(f"{what} has the help of {seen[text]}")
        seen[text] = option["name"]
        if text and option["needs_default"] and "default" not in text:
            found.append(f"{what} does not say its default")
        elif text and option["needs_default"] and not _says(text.split("default", 1)[1], option["default"]):
            found.append(f"{what} does not say that its default is {option['default']}")
    for command, child in parser["commands"].items():
        found += faults(child, f"{name} {command}")
    return found


def group_faults(parser: dict, name: str) -> list[str]:
    """Which parsers and commands have many options that are not in groups with titles."""
    found, options = [], parser["options"]
    if len(options) > UNGROUPED:
        loose = [option["name"] for option in options if option["group"] in NO_GROUP]
        titles = {option["group"] for option in options} - {*NO_GROUP, "positional arguments"}
        if loose:
            found.append(f"{name} has {', '.join(loose)} in no group")
        if len(titles) < 2:
            found.append(f"{name} has {len(options)} options in {len(titles)} groups")
    for command, child in parser["commands"].items():
        found += group_faults(child, f"{name} {command}")
    return found


def _says(text: str, default: str) -> bool:
    """Whether a text has a value; numbers in any spelling, yes and no in words."""
    try:
        return float(default) in [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    except ValueError:
        return default in text or default in YES_OR_NO or default[:1] in ("[", "(")  # lists are put into words


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_option_is_explained(path):
    command = [sys.executable, ROOT / "tests" / "help_driver.py", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    parser = json.loads(done.stdout.splitlines()[-1])
    assert parser["options"] or parser["commands"]
    assert not faults(parser, path.name)
    assert not group_faults(parser, path.name)
    examples = rf"(python|torchrun .*) (tools|patches)/{path.name}\b"
    assert re.search(examples, " ".join(parser["text"].split("usage:", 1)[1].split())), "no example"
    # quickly: what takes seconds to import is imported when it is needed
    assert not parser["loaded"] or path.name in ABOUT_DEVICES


def test_the_options_of_xmoe_are_explained():
    from megatron_xmoe.training.arguments import add_xmoe_arguments

    parser = described(add_xmoe_arguments(argparse.ArgumentParser()))
    assert len(parser["options"]) >= 7 and "X-MoE:" in parser["text"]
    assert not faults(parser, "pretrain_xmoe.py")


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_programs_explain_themselves(path):
    done = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"bash tools/{path.name} [" in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ({"help": None}, "has no help"),
        ({"help": "as --first (default: 1)", "default": 1}, "has the help of --first"),
        ({"help": "a number", "default": 5}, "does not say its default"),
        ({"help": "a number (default: 4)", "default": 5}, "does not say that its default is 5"),
        ({"help": "a number (default: 5)", "default": 5}, None),
        ({"help": "a number (default: 5)", "default": 5.0}, None),
        ({"help": "a number", "required": True}, None),
        ({"help": "switches it on", "action": "store_true"}, None),
    ],
)
def test_faults_are_found(option, fault):
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", default=1, help="as --first (default: 1)")
    parser.add_argument("--second", **option)
    found = faults(described(parser), "program")
    assert found == ([f"program --second {fault}"] if fault else [])


@pytest.mark.parametrize(
    ("titles", "fault"),
    [
        ([None] * 6, []),
        ([None] * 7, ["has --0, --1, --2, --3, --4, --5, --6 in no group", "has 7 options in 0 groups"]),
        (["a"] * 7, ["has 7 options in 1 groups"]),
        (["a"] * 6 + [""], ["has --6 in no group", "has 7 options in 1 groups"]),
        (["a"] * 5 + ["b", None], ["has --6 in no group"]),
        (["a"] * 5 + ["b", "b"], []),
    ],
)
def test_missing_groups_are_found(titles, fault):
    parser = argparse.ArgumentParser()
    command = parser.add_subparsers().add_parser("command")
    groups = {title: command.add_argument_group(title) for title in titles if title is not None}
    for number, title in enumerate(titles):
        groups.get(title, command).add_argument(f"--{number}")
    assert group_faults(described(parser), "program") == [f"program command {words}" for words in fault]
