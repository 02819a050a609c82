"""The compiled index arithmetic of redundancy bypassing on the CPU, against plain torch, bit for bit."""

from types import FunctionType

import bypass_kernel_cases as cases
import pytest
import torch

from megatron_xmoe import _optional
from megatron_xmoe.kernels import cpp_bypass, registry

_FOUND = _optional.extension("cpu")
compiled = pytest.mark.skipif(not _FOUND.usable, reason=f"megatron_xmoe._C: {_FOUND.reason}")
LONG = cases.Case(cases.TWO, 400, 513, 4)  # a token of more routes than the kernels take
segments = pytest.mark.parametrize(
    "sizes", cases.SEGMENTS + cases.MANY, ids=lambda sizes: f"{len(sizes)} of {sum(sizes)}"
)


def call(name: str, *args):
    """A function of the compiled module, with memory of its results poisoned."""
    torch.use_deterministic_algorithms(True)
    try:
        return getattr(cpp_bypass, name)(*args)
    finally:
        torch.use_deterministic_algorithms(False)


def write(name: str, target: torch.Tensor, *args) -> torch.Tensor:
    """One that writes into its first argument, which is returned."""
    target = target.clone()
    call(name, target, *args)
    return target


@compiled
@pytest.mark.parametrize("case", [*cases.CASES, *cases.LARGE, LONG], ids=str)
def test_copies(case):
    cases.check_copies(call, case)


@compiled
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_what_is_written(case):
    cases.check_writing(call, write, case)


@compiled
@segments
def test_what_is_read(sizes):
    cases.check_reading(call, write, sizes)


@compiled
@segments
def test_tables(sizes):
    cases.check_tables(call, sizes)


@compiled
def test_wrong_tensors_are_refused():
    """They are raw pointers below: a wrong type or a view would be read as something else."""
    _, _, given = cases.arguments(cases.Case(cases.TWO, 3, 4, 7))
    for wrong in (given[0].long(), given[0].T):
        with pytest.raises(ValueError, match="inverse has"):
            cpp_bypass.number_copies(wrong, *given[1:])
    with pytest.raises(ValueError, match="bytes has dtype Long; it must be uint8"):
        cpp_bypass.read_weights(torch.zeros(9, dtype=torch.int64), given[1], given[3], 1, 4)
    with pytest.raises(ValueError, match="weights must be of 4 or 8 bytes"):
        cpp_bypass.read_weights(torch.zeros(9, dtype=torch.uint8), given[1], given[3], 1, 2)
    with pytest.raises(ValueError, match="meta has dtype Short; it must be int32"):
        cpp_bypass.read_lists(torch.zeros(9, dtype=torch.int16), given[3], given[3], given[3].view(1, -1), 1)


def test_every_backend_has_them():
    """Triton has no kernels for them, and takes plain torch."""
    names = [name for name, value in vars(cpp_bypass).items() if isinstance(value, FunctionType) and name[0] != "_"]
    assert len(names) == 9
    for backend, module in (("triton", "reference_bypass"), ("reference", "reference_bypass"), ("cpp", "cpp_bypass")):
        for name in names:
            assert registry.implementation(backend, name).__module__.endswith(module)
