"""docs/algorithms.md: its figures and tables of computed numbers are what the code gives today."""

import importlib
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS, FIGURES = ROOT / "tools", ROOT / "docs" / "figures"
PAGE = ROOT / "docs" / "algorithms.md"
NAMES = ("pft", "rbd", "redundancy", "ssmb", "break_even")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def tools():
    """The tool's modules; they import one another, as they do when run as scripts."""
    before = list(sys.path)
    sys.path[:0] = [str(TOOLS), str(ROOT)]
    try:
        yield Namespace(**{name: importlib.import_module(name) for name in ("draw_figures", "figure_data")})
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def drawn(tools, tmp_path_factory) -> Path:
    """A folder with the figures as they are drawn today."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    folder = tmp_path_factory.mktemp("figures")
    tools.draw_figures.draw(tools.figure_data.figures(), folder, "svg")
    return folder


def data_in(path: Path):
    """What a picture was drawn from."""
    (description,) = ElementTree.parse(path).iter("{http://purl.org/dc/elements/1.1/}description")
    return json.loads(description.text)


def words_in(path: Path) -> list[str]:
    """Everything that is written in a picture; signs of any kind of minus are one."""
    texts = ("".join(element.itertext()) for element in ElementTree.parse(path).iter(f"{SVG}text"))
    return [" ".join(text.replace("\u2212", "-").split()) for text in texts]


def assert_alike(found, expected, name: str) -> None:
    """Numbers to rounding: another version of torch may add up in another order."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), name
        for key, value in expected.items():
            assert_alike(found[key], value, f"{name}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), name
        for i, value in enumerate(expected):
            assert_alike(found[i], value, f"{name}[{i}]")
    else:
        assert found == pytest.approx(expected, abs=1e-3), f"{name}: run tools/draw_figures.py"


def test_every_figure_is_committed_and_on_the_page(tools):
    assert sorted(path.name for path in FIGURES.iterdir()) == sorted(f"{name}.svg" for name in NAMES)
    assert re.findall(r"\(figures/(\w+)\.svg\)", PAGE.read_text()) == list(NAMES)
    assert tuple(tools.figure_data.figures()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_figures_hold_the_data_of_today(tools, name):
    today = json.loads(json.dumps(tools.figure_data.figures()[name], sort_keys=True))
    assert_alike(data_in(FIGURES / f"{name}.svg"), today, name)


@pytest.mark.parametrize("name", NAMES)
def test_figures_say_what_is_drawn_today(drawn, name):
    assert words_in(FIGURES / f"{name}.svg") == words_in(drawn / f"{name}.svg"), "run tools/draw_figures.py"


def test_drawing_again_gives_the_same_bytes(tools, drawn, tmp_path):
    tools.draw_figures.draw(tools.figure_data.figures(), tmp_path, "svg")
    for name in NAMES:
        assert (tmp_path / f"{name}.svg").read_bytes() == (drawn / f"{name}.svg").read_bytes(), name


@pytest.mark.parametrize("name", ["arrays", "rows", "redundancy", "few", "break-even"])
def test_tables_of_the_page_are_computed(tools, name):
    table = tools.figure_data.tables()[name]
    assert table in PAGE.read_text(), f"docs/algorithms.md has another table; tools/draw_figures.py prints\n{table}"


def test_there_is_no_other_table(tools):
    assert set(tools.figure_data.tables()) == {"arrays", "rows", "redundancy", "few", "break-even"}


def test_counted_redundancy_is_the_closed_form(tools):
    data = tools.figure_data.redundancies()
    assert data["measured many"] == pytest.approx(data["many"]["8"], abs=0.01)
    assert data["measured few"] == pytest.approx(data["few"], abs=0.01)


def test_every_token_is_in_one_share(tools):
    parts = tools.figure_data.shares()["on"]
    tokens = [token for first, end in parts for token in range(first, end)]
    assert tokens == list(range(tools.figure_data.LENGTH))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--output", "none"], "--output none is not a folder: make it first, or start this in the repository"),
        (["--output", ".", "--format", "gif"], "argument --format: invalid choice: 'gif'"),
    ],
)
def test_errors_are_one_line(arguments, complaint, tmp_path):
    command = [sys.executable, TOOLS / "draw_figures.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_matplotlib_is_named(tools, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(tools.draw_figures.UserError, match=r"matplotlib is not installed: pip install matplotlib"):
        tools.draw_figures.main(["--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
