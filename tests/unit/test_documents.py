"""README and docs: every file, name and link in them exists."""

import importlib
import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "patches" / "README.md", *(ROOT / "docs").glob("*.md")])
TOP = (".ci", "csrc", "docs", "megatron_xmoe", "patches", "tests", "tools")
SOURCES = (".py", ".sh", ".cu", ".cpp", ".h", ".sbatch")
OF_OTHERS = {"cudaMemset", "tflops_parser"}
# of Megatron-LM, not in the wheel; of the original X-MoE
SCRIPTS_OF_OTHERS = {"pretrain_gpt.py", "pretrain_hybrid.py", "train_rl.py", "X-MoE-Small-node-1.sh"}

FENCE = re.compile(r"^( *)```.*?^\1```[^\n]*$", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
# in text and in commands; not below another folder, as in ~/Megatron-LM/tools/x.py
PATH = re.compile(rf"(?<![\w./~-])((?:{'|'.join(map(re.escape, TOP))})/[\w.*/{{}},-]*[\w*/}}])(?:::(\w+))?")
FILE_NAME = re.compile(rf"[\w.*{{}},/-]+({'|'.join(map(re.escape, SOURCES))})")
DOTTED = re.compile(r"_?[A-Za-z]\w*(\.\w+)*(\(\))?")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.M)


def prose(text: str) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What is in backticks, outside of code blocks; a span may go over the end of a line."""
    paragraphs = re.split(r"\n\s*\n", prose(text))
    return [" ".join(span.split()) for paragraph in paragraphs for span in SPAN.findall(paragraph)]


def spelled(path: str) -> list[str]:
    """A path for each choice of its braces."""
    parts = [part.split(",") for part in re.split(r"[{}]", path)]
    return ["".join(choice) for choice in product(*parts)] if "{" in path else [path]


@cache
def files() -> tuple[str, ...]:
    """The repository's files, without what is built or installed."""
    found = [path for top in TOP for path in (ROOT / top).rglob("*") if path.is_file()]
    found += [path for path in ROOT.iterdir() if path.is_file()]
    return tuple(str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts)


@cache
def wheel() -> Path:
    """The folder `megatron` of the installed wheel."""
    return Path(importlib.import_module("megatron.core").__file__).parents[1]


@cache
def words(megatron: bool) -> frozenset[str]:
    """All words of the repository's programs, or of Megatron's."""
    if megatron:
        paths = [path for part in ("core", "training") for path in (wheel() / part).rglob("*.py")]
    else:
        skipped = (".md", ".so", Path(__file__).name)  # the names that do not exist stand here
        paths = [ROOT / name for name in files() if not name.endswith(skipped)]
    found: set[str] = set()
    for path in paths:
        found.update(re.findall(r"\w+", path.read_text(errors="replace")))
    return frozenset(found)


@cache
def defined() -> frozenset[str]:
    """Functions, methods and classes of the repository and of Megatron."""
    paths = [ROOT / name for name in files() if name.endswith((*SOURCES, "run"))]
    paths += [path for part in ("core", "training") for path in (wheel() / part).rglob("*.py")]
    found: set[str] = set()
    for path in paths:
        text = path.read_text(errors="replace")
        found.update(re.findall(r"(?:def|class) +(\w+)|^(\w+)\(\) \{|\b(\w+)\(const ", text, re.M))
    return frozenset(name for names in found for name in names if name)


def is_there(path: str) -> bool:
    """Whether a path, which may hold * and {a,b}, is one of the repository's."""
    return all(any(ROOT.glob(one.rstrip("/"))) for one in spelled(path))


def names_a_file(name: str) -> bool:
    """Whether a file name, or the end of a path, is one of the repository's or of Megatron's."""
    if name in SCRIPTS_OF_OTHERS:
        return True
    if name.startswith("megatron/"):
        return (wheel().parent / name).is_file()
    ends = [re.compile("(.*/)?" + re.escape(one).replace(r"\*", "[^/]*")) for one in spelled(name)]
    return all(any(end.fullmatch(file) for file in files()) for end in ends)


def resolves(dotted: str) -> bool:
    """Whether a full name can be imported, as a module or as something in one."""
    parts = dotted.split(".")
    for number in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:number]))
        except ImportError:
            continue
        for part in parts[number:]:
            if not hasattr(owner, part):
                return part in getattr(owner, "__annotations__", {})
            owner = getattr(owner, part)
        return True
    return False


def fault_of_name(span: str) -> str | None:
    """What is wrong with a span that names a function, a class, a module or a variable; None if nothing is."""
    name = span.removesuffix("()")
    parts = name.split(".")
    if parts[0] in ("megatron_xmoe", "megatron", "torch") and len(parts) > 1:
        return None if name == "megatron_xmoe._C" or resolves(name) else f"`{span}` cannot be imported"
    if span.endswith("()"):
        owners = {part for part in parts[:-1] if part[:1].isupper()}
        there = {parts[-1], *owners} <= defined() and set(parts) <= known()
        return None if there else f"`{span}` is defined nowhere"
    looks_like_code = "." in name or re.search(r"_|[a-z][A-Z]", name)
    return f"`{span}` occurs nowhere" if looks_like_code and not set(parts) <= known() | OF_OTHERS else None


@cache
def known() -> frozenset[str]:
    """All words of programs, and the names of files."""
    return words(False) | words(True) | {Path(name).stem for name in files()} | {Path(n).suffix[1:] for n in files()}


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def faults_of_links(text: str, document: Path) -> list[str]:
    """Links to files and headings that are not there."""
    found = []
    for target in LINK.findall(prose(text)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists():
            found.append(f"link to {target}: there is no such file")
        elif anchor:
            content = text if path == document else path.read_text()
            if anchor not in map(slug, HEADING.findall(prose(content))):
                found.append(f"link to {target}: there is no such heading")
    return found


def faults(text: str, document: Path) -> list[str]:
    """Everything that a document names and that is not there."""
    found = faults_of_links(text, document)
    for path, test in PATH.findall(text):
        if not is_there(path):
            found.append(f"{path}: there is no such file")
        elif test and not re.search(rf"(def|class) {test}\b", (ROOT / path).read_text()):
            found.append(f"{path}::{test}: there is no such test")
    for span in spans(text):
        if FILE_NAME.fullmatch(span):
            if not names_a_file(span):
                found.append(f"`{span}`: there is no such file")
        elif DOTTED.fullmatch(span) and (fault := fault_of_name(span)):
            found.append(fault)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document):
    assert not faults(document.read_text(), document)


def test_the_example_of_the_start_up_block_has_the_programs_lines():
    (block,) = re.findall(r"```\n(megatron_xmoe \d.*?)```", (ROOT / "docs" / "megatron.md").read_text(), re.S)
    labels = {line[:13] for line in block.splitlines()[1:]}
    source = (ROOT / "megatron_xmoe" / "training" / "report.py").read_text()
    assert len(labels) > 8 and not [label for label in labels if f'"{label}' not in source]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see `tools/nothing.py`", "tools/nothing.py"),
        ("run\n\n```bash\nbash tools/nothing.sh\n```\n", "tools/nothing.sh"),
        ("`csrc/routes.{h,cu,none}`", "csrc/routes"),
        ("`tests/unit/test_ops.py::test_nothing`", "test_nothing"),
        ("`ops/nothing.py`", "ops/nothing.py"),
        ("`nothing.cu`", "nothing.cu"),
        ("`megatron/core/nothing.py`", "megatron/core/nothing.py"),
        ("`build_nothing()`", "build_nothing"),
        ("`Nothing.forward()`", "Nothing"),
        ("`megatron_xmoe.ops.nothing`", "nothing"),
        ("`megatron.core.nothing`", "nothing"),
        ("`NothingAtAll`", "NothingAtAll"),
        ("`nothing_at_all`", "nothing_at_all"),
        ("[a](docs/nothing.md)", "docs/nothing.md"),
        ("[a](docs/options.md#nothing)", "#nothing"),
        ("[a](#nothing)\n# Something\n", "#nothing"),
    ],
)
def test_what_is_not_there_is_noticed(text, fault):
    found = faults(text, ROOT / "README.md")
    assert found and all(fault in one for one in found)


@pytest.mark.parametrize(
    "text",
    [
        "`tools/compile_triton.py`, `csrc/routes.{h,cu}`, `csrc/*.cu`, `dispatch/`, `ops/routes.py`, `routes.cu`",
        "`tests/unit/test_ops.py::test_gather_rows` and `megatron/core/parallel_state.py`",
        "`build_routes()`, `XMoELayer.route()`, `megatron_xmoe.ops.build_routes`, `DispatchState`, `ALLOWED`",
        "`~/Megatron-LM/tools/anything.py` and `auto`, `--xmoe-kernels`, `[T, E]`, `a b.py`",
        "[a](docs/options.md#served) [b](#a-heading) [c](https://example.org/x.md)\n## A heading\n",
        "```bash\nmake `nothing_at_all`\n```\n",
    ],
)
def test_what_is_there_passes(text):
    assert not faults(text, ROOT / "README.md")


def test_messages_in_the_troubleshooting_table_are_printed():
    """What the first column quotes is in our sources or Megatron's, but for the parts that '...' stands for."""
    rows = re.search(r"^## Troubleshooting$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)[1].splitlines()
    quoted = [span for row in rows if row.startswith("| ") for span in SPAN.findall(row.split(" | ")[0])]
    folders = [ROOT / "megatron_xmoe", ROOT / "tools", wheel() / "core" / "optimizer"]
    sources = "".join(path.read_text() for folder in folders for path in sorted(folder.rglob("*.*"))
                      if path.suffix in (".py", ".sh")) + (ROOT / "setup.py").read_text()  # fmt: skip
    parts = [part.strip() for span in quoted for part in span.split("...") if part.strip()]
    assert len(parts) >= 6 and not [part for part in parts if part not in sources]
