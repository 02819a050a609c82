"""README and docs: every option in them exists, and the page for users of the original X-MoE names ours rightly."""

import argparse
import re
import shlex
import warnings
from functools import cache
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments, validate_args
from recipes import words_of

from megatron_xmoe.training.arguments import add_xmoe_arguments, parse
from megatron_xmoe.training.checks import check_arguments
from megatron_xmoe.training.defaults import adjust
from megatron_xmoe.training.options import check_options

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "patches" / "README.md", *(ROOT / "docs").glob("*.md")])
PAGE = ROOT / "docs" / "from-x-moe.md"
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# of pip, torchrun, sbatch, nsys and setup.py
OF_OTHER_PROGRAMS = set(
    """
    --nproc-per-node --nnodes --standalone --rdzv-backend --rdzv-endpoint --max-restarts --nodes --inplace
    --capture-range --capture-range-end
    """.split()
)
# where the second command line of the page differs from the recipe, see the text under it; the last follow from others
UNLIKE_THE_RECIPE = set(
    """
    global_batch_size train_iters lr_decay_iters lr_warmup_iters add_bias_linear attention_dropout hidden_dropout
    initial_loss_scale loss_scale_window data_path split mock_data add_qkv_bias eval_global_batch_size
    """.split()
)


@cache
def parser() -> argparse.ArgumentParser:
    """Megatron's parser with our options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Megatron's, of argparse
        return add_xmoe_arguments(add_megatron_arguments(argparse.ArgumentParser(add_help=False)))


@cache
def options_of_training() -> frozenset[str]:
    """What pretrain_xmoe.py takes."""
    return frozenset(string for action in parser()._actions for string in action.option_strings) | {"--help"}


@cache
def options_of_tools() -> frozenset[str]:
    """What the programs of the repository take: the options in their texts, and those that they make of names."""
    programs = [path for folder in ("tools", "patches") for path in (ROOT / folder).rglob("*.[ps][yh]")]
    programs += [ROOT / "tests" / "conftest.py", ROOT / "megatron_xmoe" / "info.py"]
    found: set[str] = set()
    for path in programs:
        text = path.read_text()
        found.update(OPTION.findall(text))
        if re.search(r'f"--\{name|command\("', text):
            found.update(f"--{name}" for pair in re.findall(r'"(\w+)": "|\b(\w+)="', text) for name in pair if name)
    return frozenset(found)


def unknown(text: str, known: frozenset[str] | set[str]) -> list[str]:
    """Options in a text that are not known; one that is cut short, as --xmoe-..., must begin a known one."""
    return [
        option
        for option in OPTION.findall(text)
        if option not in known and not (option.endswith("-") and any(one.startswith(option) for one in known))
    ]


def rows_of_the_page() -> list[list[str]]:
    """Cells of the page's tables, without their heads."""
    found, inside = [], False
    for line in PAGE.read_text().splitlines():
        if line.startswith("| original |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def command(head: str) -> list[str]:
    """The words of the page's command line under a comment."""
    (block,) = re.findall(rf"```bash\n# {head}\n(.*?)```", PAGE.read_text(), re.S)
    return shlex.split(block.replace("\\\n", " "))


def options_of_the_original() -> set[str]:
    """What the page's first columns and its first command line name."""
    cells = " ".join(row[0] for row in rows_of_the_page())
    return {*OPTION.findall(cells), *OPTION.findall(" ".join(command("the original"))), "--apply-layernorm-1p"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_in_a_document_exist(document):
    known = options_of_training() | options_of_tools() | OF_OTHER_PROGRAMS
    if document == PAGE:
        known = known | options_of_the_original()
    assert not unknown(document.read_text(), known)


@pytest.mark.parametrize("text", ["`--xmoe-nothing`", "--moe-router-top", "--nothing-...", "`--topk K`"])
def test_an_option_that_does_not_exist_is_noticed(text):
    assert unknown(text, options_of_training() | OF_OTHER_PROGRAMS)


def test_the_pages_tables_are_read():
    rows = rows_of_the_page()
    assert len(rows) > 40 and {len(row) for row in rows} == {3}


@pytest.mark.parametrize("row", rows_of_the_page(), ids=lambda row: row[0][:60])
def test_our_side_of_the_page_is_what_the_parser_knows(row):
    assert not unknown(row[1], options_of_training())
    assert row[1] in ("none", "leave it out") or OPTION.search(row[1]) or "tools/" in row[1]


def arguments(monkeypatch, words: list[str]) -> argparse.Namespace:
    """A command line, parsed, adjusted and checked as pretrain_xmoe.py does it on eight ranks."""
    monkeypatch.setattr("sys.argv", ["pretrain_xmoe.py", *words])
    for name, value in {"WORLD_SIZE": "8", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    args, given, defaults = parse()
    adjust(args, given, on_cpu=True)
    check_arguments(args)
    check_options(args, defaults)
    return args


def test_the_pages_command_line_is_the_recipe(monkeypatch, capsys):
    words = command("here")
    ours = arguments(monkeypatch, words[words.index("pretrain_xmoe.py") + 1 :])
    recipe = arguments(monkeypatch, [*words_of("xmoe_small"), "--mock-data"])
    for args in (ours, recipe):
        validate_args(args)  # Megatron's checks; they also make lists and defaults alike
    capsys.readouterr()
    different = {name for name in vars(ours) if getattr(ours, name) != getattr(recipe, name)}
    assert different == UNLIKE_THE_RECIPE
    tokens = 300e9, 375e6  # of the original's schedule
    steps = [int(count / ours.seq_length / ours.global_batch_size) for count in tokens]
    assert [ours.lr_decay_iters, ours.lr_warmup_iters] == steps
    assert ours.moe_ffn_hidden_size == 1408 and ours.initial_loss_scale == 2**11


def test_the_pages_pattern_of_layers():
    """--expert-interval 2 gives experts to the second, the fourth and so on of 28 layers."""
    (written,) = re.findall(r"`(--moe-layer-freq '.+?')`", PAGE.read_text())
    parsed = parser().parse_args(shlex.split(written)).moe_layer_freq
    assert parsed == [int(number % 2 == 0) for number in range(1, 29)]


def test_the_defaults_that_the_page_names():
    named = {
        "moe_router_topk": 2, "moe_aux_loss_coeff": 0.0, "moe_layer_freq": 1, "moe_expert_capacity_factor": None,
        "moe_token_drop_policy": "probs", "xmoe_min_capacity": 0, "xmoe_combine_weights": "probs",
        "xmoe_dispatcher": "auto", "xmoe_sequence_shard": "auto", "initial_loss_scale": 2**32,
        "attention_dropout": 0.1, "hidden_dropout": 0.1,
    }  # fmt: skip
    assert {name: parser().get_default(name) for name in named} == named
