"""Fused routing in Triton's interpreter against Megatron's own, and where it is used and refused."""

import importlib.util
import os
from unittest import mock

import harness
import pytest
import router_cases as cases
from megatron.core.transformer.moe.router import TopKRouter

from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.kernels import registry
from megatron_xmoe.router import FusedRouter
from megatron_xmoe.specs import substitutions
from megatron_xmoe.training.arguments import parse
from megatron_xmoe.training.defaults import adjust
from megatron_xmoe.training.errors import UsageError
from megatron_xmoe.training.options import check_options

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
PADDED = [name for name in cases.ROUTERS if name != "expert bias in groups"]  # Megatron fails to count for the bias
CALLS = [
    *((f"case {case}", "compare", (case, "cpu")) for case in cases.CASES),
    ("in parts", "compare_in_parts", ("cpu",)),
    ("ties", "check_ties", ("cpu",)),
    ("fine differences", "check_fine_differences", ("cpu",)),
    ("nothing", "check_nothing", ("cpu",)),
    *((f"router {name}", "compare_routers", (name, "cpu")) for name in cases.ROUTERS),
    *((f"router {name}, padded", "compare_routers", (name, "cpu", True)) for name in PADDED),
    ("router in bf16", "compare_bf16_routers", ("cpu",)),
    ("layer", "compare_layers", ("cpu",)),
    ("refusals", "check_refusals", ()),
]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What failed of CALLS, all made in one process, which has to ask for the interpreter before it imports Triton."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        (found,) = harness.run_distributed(cases.run_interpreted, 1, CALLS, timeout=600)
    return found


@pytest.mark.parametrize("label", [call[0] for call in CALLS])
def test_equals_megatrons(failures, label):
    assert label not in failures, failures[label]


@pytest.fixture
def on_gpu(monkeypatch):
    """Triton can run, as far as the program can see."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(registry, "_candidate", lambda name, device: registry.Candidate(name, device == "cuda", ""))


def adjusted(monkeypatch, options: str, on_cpu: bool = False):
    """Arguments of a command line and their defaults, as `settle` adjusts them, and whether it reports the fusion."""
    command = f"pretrain_xmoe.py --moe-backend xmoe --num-experts 8 --moe-router-topk 2 {options}"
    monkeypatch.setattr("sys.argv", command.split())
    args, given, defaults = parse()
    lines = [line for line in adjust(args, given, on_cpu) if line.startswith("--moe-router-fusion  (")]
    return args, defaults, lines


def test_set_where_it_is_served(monkeypatch, on_gpu):
    for options, reported in (("", 1), ("--moe-router-fusion", 0), ("--moe-router-score-function sigmoid", 1)):
        args, defaults, lines = adjusted(monkeypatch, options)
        assert args.moe_router_fusion and len(lines) == reported
        check_options(args, defaults)


@pytest.mark.parametrize(
    "options",
    [
        "--moe-router-load-balancing-type sinkhorn",
        "--moe-router-load-balancing-type quantile_balancing",
        "--moe-enable-routing-replay",
        "--xmoe-kernels reference",
        "--moe-router-num-groups 4 --moe-router-group-topk 2 --xmoe-group-score max",
    ],
)
def test_left_out_or_refused_where_it_is_not(monkeypatch, on_gpu, options):
    args, defaults, lines = adjusted(monkeypatch, options)
    assert not args.moe_router_fusion and not lines
    check_options(args, defaults)
    args, defaults, _ = adjusted(monkeypatch, f"{options} --moe-router-fusion")
    with pytest.raises(UsageError, match="--moe-backend xmoe does not take --moe-router-fusion: .*leave it out"):
        check_options(args, defaults)


def test_nothing_changes_elsewhere(monkeypatch, on_gpu):
    assert not adjusted(monkeypatch, "", on_cpu=True)[0].moe_router_fusion
    assert not adjusted(monkeypatch, "--moe-backend megatron")[0].moe_router_fusion
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")
    assert not adjusted(monkeypatch, "")[0].moe_router_fusion
    assert adjusted(monkeypatch, "--xmoe-kernels triton")[0].moe_router_fusion


def test_only_the_specs_of_our_layers_get_it():
    """Stock layers with --moe-router-fusion stay Transformer Engine's business."""
    config = cases.config_of(moe_router_fusion=True)
    assert substitutions(config, XMoEConfig(moe_backend="xmoe"))[TopKRouter].func is FusedRouter
    assert TopKRouter not in substitutions(config, XMoEConfig())
    assert TopKRouter not in substitutions(cases.config_of(), XMoEConfig(moe_backend="xmoe"))


def test_a_router_that_cannot_run_is_not_built():
    with pytest.raises(ValueError, match="--moe-router-fusion cannot be used: Triton's kernels need a GPU .* Fix: "):
        FusedRouter(cases.config_of(moe_router_fusion=True))
