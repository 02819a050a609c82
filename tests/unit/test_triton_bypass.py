"""The Triton kernels of redundancy bypassing in Triton's interpreter, against plain torch, bit for bit."""

import importlib.util

import bypass_kernel_cases as cases
import pytest

from megatron_xmoe.kernels import registry

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def call(interpreted):
    """A function of the kernels' module that returns its result."""
    return lambda name, *args: interpreted("triton_bypass", name, *args)


@pytest.fixture
def write(interpreted):
    """One that writes into its first argument, which is returned."""
    return lambda name, target, *args: interpreted("triton_bypass", name, target, *args, returned=0)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_copies(call, case):
    cases.check_copies(call, case)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_what_is_written(call, write, case):
    cases.check_writing(call, write, case)


@pytest.mark.parametrize("sizes", cases.SEGMENTS, ids=lambda sizes: f"{len(sizes)} of {sum(sizes)}")
def test_what_is_read(call, write, sizes):
    cases.check_reading(call, write, sizes)


@pytest.mark.parametrize("sizes", cases.SEGMENTS, ids=lambda sizes: f"{len(sizes)} of {sum(sizes)}")
def test_tables(call, write, sizes):
    cases.check_tables(call, write, sizes)


def test_only_a_pin_takes_them(monkeypatch):
    """Until they are measured; what is not in the table is used unless plain torch is pinned."""
    monkeypatch.setattr(registry, "_candidate", lambda name, device: registry.Candidate(name, True, ""))
    for pinned, usual, bypassing in (("auto", True, False), ("cpp", True, False), ("triton", True, True),
                                     ("reference", False, False)):  # fmt: skip
        monkeypatch.setenv(registry.ENVIRONMENT, pinned)
        assert registry.triton_is_usable("cuda") == usual
        assert registry.triton_is_usable("cuda", "bypass") == bypassing
        monkeypatch.setattr(registry, "ONLY_PINNED", {})
        assert registry.triton_is_usable("cuda", "bypass") == usual
        monkeypatch.setattr(registry, "ONLY_PINNED", {"bypass": "not measured"})
    monkeypatch.setenv(registry.ENVIRONMENT, "triton")
    monkeypatch.setattr(registry, "_candidate", lambda name, device: registry.Candidate(name, False, "why"))
    assert not registry.triton_is_usable("cuda", "bypass")
