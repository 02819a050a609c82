"""Fused routing in Triton's interpreter against Megatron's own, and where it is used and refused."""

import importlib.util
import os
from unittest import mock

import harness
import pytest
import router_cases as cases

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
PADDED = [name for name in cases.ROUTERS if name != "expert bias in groups"]  # Megatron fails to count for the bias
CALLS = [
    *((f"case {case}", "compare", (case, "cpu")) for case in cases.CASES),
    ("in parts", "compare_in_parts", ("cpu",)),
    ("ties", "check_ties", ("cpu",)),
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
