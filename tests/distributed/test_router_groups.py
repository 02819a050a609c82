"""Fused routing on several ranks: losses over tensor- and data-parallel groups are Megatron's."""

import importlib.util
import os
from unittest import mock

import harness
import pytest
import router_cases as cases

NAMES = ["loss per token", "three losses", "seq_aux_loss per token"]
CALLS = [(f"{name} {padded}", "compare_routers", (name, "cpu", padded)) for name in NAMES for padded in (False, True)]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_losses_over_groups():
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        found = harness.run_distributed(cases.run_interpreted, 2, CALLS, ({"tp": 2}, {}), timeout=300)
    assert found == [{}, {}], "\n".join(text for failures in found for text in failures.values())
