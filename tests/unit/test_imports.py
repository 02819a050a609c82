"""Who may import whom, and that importing changes nothing, so that a Megatron upgrade breaks only what touches it."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_xmoe"
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))

LEAVES = ("config", "version", "traffic", "_optional")
OURS_BELOW_LAYERS = ("dispatch", "ops", "parallel_state", "metrics", "profiling", *LEAVES)
LAYERS = ("layer", "experts", "sequence_shard", "shared_experts", "norm", "qk_norm", "attention", "routing", "router")
# the dispatcher's base class, and what its constructor and its exchange are made of
DISPATCHER_BASE = (
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.transformer_config",
    "megatron.core.process_groups_config",
    "megatron.core.tensor_parallel",
)


def ours(*parts: str) -> tuple[str, ...]:
    """Full names of parts of the package."""
    return tuple(f"{PACKAGE}.{part}" for part in parts)


# part of the package -> what it may import, itself and the standard library aside; a name stands for all below it
ALLOWED: dict[str, tuple[str, ...]] = {
    "__init__": ours("config", "version"),
    **dict.fromkeys(LEAVES, ()),
    "kernels": ("torch", "triton", *ours("_C", *LEAVES)),
    "ops": ("torch", *ours("kernels")),
    "profiling": ("torch", "megatron.core.utils", "megatron.core.transformer.moe.moe_logging", *ours(*LEAVES)),
    "figures": ("numpy", *ours("profiling")),
    "parallel_state": ("torch", "megatron.core", *ours(*LEAVES)),
    "metrics": ("torch", "numpy", "megatron.core", *ours("parallel_state", "profiling", "figures", *LEAVES)),
    "dispatch": ("torch", "numpy", *DISPATCHER_BASE, *ours("ops", "parallel_state", "metrics", "profiling", *LEAVES)),
    **dict.fromkeys(LAYERS, ("torch", "megatron.core", *ours(*OURS_BELOW_LAYERS, *LAYERS))),
    **dict.fromkeys(
        ("specs", "backend"),
        (
            *("torch", "megatron.core"),
            *ours("specs", "metrics", "kernels.registry", "kernels.grouped_gemm", *LAYERS, *LEAVES),
        ),
    ),
    # names Megatron's symbols as strings; only the version is looked up, for an error message
    "platform": ("torch", "megatron.core.package_info", *ours("ops")),
    "training": (
        *("torch", "numpy", "megatron.core", "megatron.training"),
        # for defaults, and for the start-up report, which says why
        *ours("dispatch.choice", "parallel_state", "sequence_shard", "router"),
        *ours("backend", "specs", "metrics", "platform", "kernels", "profiling", "checkpoint", *LEAVES),
    ),
    "checkpoint": (
        *("torch", "numpy", "safetensors", "huggingface_hub", "transformers", "tqdm"),
        "megatron.core.dist_checkpointing",
        *("megatron.core.transformer.moe", *ours(*LEAVES)),  # its upcycling, and the classes that it looks for
    ),
    "info": ("torch", *ours("platform", "kernels", *LEAVES)),
}
FORBIDDEN = {"ops": ("torch.distributed",), "kernels": ("torch.distributed",)}


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(), str(path))


def imports_of(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, full name) of everything imported anywhere in a file, and of dotted uses like `torch.distributed`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found.append((node.lineno, f"torch.{node.attr}"))
    return found


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether `name` is one of `prefixes` or something in it."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def violations(part: str, tree: ast.Module) -> list[str]:
    """Imports that the table does not allow."""
    allowed = (*ALLOWED[part], *ours(part), *sys.stdlib_module_names)
    return [
        f"line {line}: {part} must not import {name}"
        for line, name in imports_of(tree)
        if not below(name, allowed) or below(name, FORBIDDEN.get(part, ()))
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_imports_follow_the_table(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} is new: say in ALLOWED, and in the design, what it may import"
    assert not violations(part, tree_of(path))


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("ops", "import megatron.core"),
        ("ops", "from torch import distributed"),
        ("ops", "x = torch.distributed.get_rank()"),
        ("kernels", "from megatron_xmoe.ops import routes"),
        ("dispatch", "from megatron.core.transformer.moe.router import TopKRouter"),
        ("dispatch", "from megatron_xmoe.layer import XMoELayer"),
        ("layer", "def f():\n    from megatron.training import get_args"),
        ("backend", "import megatron_xmoe.training.options"),
        ("platform", "from megatron.core import parallel_state"),
        ("checkpoint", "from megatron_xmoe import dispatch"),
        ("config", "import torch"),
        ("training", "import tools.preprocess_data"),
    ],
)
def test_the_table_is_enforced(part, line):
    assert violations(part, ast.parse(line))


def statements_that_act(module: ast.Module) -> list[int]:
    """Lines of module-level statements that do more than define: bare calls, deletions, changes of others' objects."""
    own = {node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return [node.lineno for node in run_at_import(module.body) if acts(node, own)]


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The simple statements of a module, those in classes and branches included, those in functions not."""
    for node in body:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(node, "handlers", [])]
        if any(blocks):
            yield from run_at_import([child for block in blocks for child in block])
        else:
            yield node


def acts(node: ast.stmt, own: set[str]) -> bool:
    """Whether a statement changes something; attributes of the module's own functions and classes may be set."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)  # docstrings are constants
    targets = [target for target in getattr(node, "targets", [getattr(node, "target", None)]) if target]
    foreign = [t for t in targets if isinstance(t, ast.Attribute | ast.Subscript) and ast.unparse(t.value) not in own]
    return isinstance(node, ast.Delete) or bool(foreign)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_modules_only_define_at_import(path):
    assert not statements_that_act(tree_of(path))


@pytest.mark.parametrize(
    ("code", "acting"),
    [
        ("install()", True),
        ("if True:\n    pass\nelse:\n    install()", True),
        ("try:\n    import a\nexcept ImportError:\n    install()", True),
        ("class A:\n    install()", True),
        ("torch.cuda.synchronize = print", True),
        ("setattr(a, 'b', 1)", True),
        ("a['b'] = 1", True),
        ("del a.b", True),
        ("def f():\n    install()", False),
        ("def f():\n    pass\nf.mark = True", False),
        ("if __name__ == '__main__':\n    install()", False),
        ("'docstring'\nx: int = f(1)\n'docstring of x'", False),
    ],
)
def test_acting_at_import_is_noticed(code, acting):
    assert bool(statements_that_act(ast.parse(code))) is acting


def run_python(code: str) -> dict:
    """What a fresh interpreter prints last, as JSON."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_light_imports_stay_light():
    loaded = "[name for name in ('torch', 'megatron', 'triton', 'transformer_engine', 'apex') if name in sys.modules]"
    found = run_python(f"""
import json, sys
import megatron_xmoe
package = {loaded}
import megatron_xmoe.platform.cpu, megatron_xmoe.platform.wheel, megatron_xmoe.kernels.registry, megatron_xmoe.ops
print(json.dumps([package, "megatron" in sys.modules]))
""")
    assert found == [[], False]


def test_importing_everything_replaces_nothing():
    """Every function and class of torch and Megatron is the same object before and after the whole package came."""
    found = run_python("""
import importlib, inspect, json, pkgutil, sys
import torch, torch.distributed
import megatron.training.training, megatron.core.models.gpt.gpt_layer_specs

def symbols():
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("torch", "megatron") and module is not None:
            for key, value in list(vars(module).items()):
                if callable(value):
                    yield f"{name}:{key}", value
                if inspect.isclass(value) and value.__module__ == name:
                    for attribute, member in list(vars(value).items()):
                        if callable(member):
                            yield f"{name}:{key}.{attribute}", member

before = dict(symbols())
import megatron_xmoe
for module in pkgutil.walk_packages(megatron_xmoe.__path__, "megatron_xmoe."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
after = dict(symbols())
print(json.dumps([len(before), [name for name, value in before.items() if after.get(name) is not value]]))
""")
    assert found[0] > 1000
    assert found[1] == []
