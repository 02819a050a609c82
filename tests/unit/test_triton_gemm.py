"""The Triton kernels of the experts' matrix products, in Triton's interpreter, against products of single experts.

Both ways of moving tiles run: 16-bit types with rows of a multiple of 16 bytes go through tensor descriptors, the
rest through pointers.
"""

import importlib.util

import pytest
import torch
from tolerances import assert_close, assert_same
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# rows of each expert, features in, features out: experts with and without rows, one tile of rows and several
CASES = {
    "plain": ([5, 0, 33, 16], 24, 40),
    "first experts empty": ([0, 0, 7], 16, 16),
    "last expert empty": ([20, 0], 56, 8),
    "one expert": ([50], 48, 72),
    "odd sizes": ([3, 2, 17], 17, 10),
    "no rows": ([0, 0], 8, 8),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.float16: torch.bfloat16}


def small_tile(tma: bool, itemsize: int, shared_memory: int) -> dict[str, int]:
    """Tiles so small that the cases have several in each direction."""
    return {"BM": 16, "BN": 32, "BK": 16}


SMALL = {"tile_of": small_tile}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


def products(rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """[M, N] in fp64: the rows of each expert times its weight [N, D]."""
    parts = zip(rows.double().split(sizes), weight.double(), strict=True)
    return torch.cat([part @ w.t() for part, w in parts])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_multiply(interpreted, case, dtype, transposed):
    sizes, D, N = case
    rows, weight = random(sum(sizes), D, dtype=dtype), random(len(sizes), N, D, dtype=dtype)
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    found = interpreted(
        "triton_grouped_gemm", "multiply", rows, stored, ends_of(sizes), None, transposed, constants=SMALL
    )
    assert found.dtype == dtype
    assert_close(found, products(rows, weight, sizes), dtype=TOLERANCE.get(dtype, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multiply_gathers_its_rows(interpreted, case, dtype):
    sizes, D, N = case
    tokens, weight = random(11, D, dtype=dtype), random(len(sizes), N, D, dtype=dtype)
    index = torch.randint(0, 11, (sum(sizes),), generator=torch.Generator().manual_seed(0)).int()
    found = interpreted(
        "triton_grouped_gemm", "multiply", tokens, weight, ends_of(sizes), index, False, constants=SMALL
    )
    assert_close(found, products(tokens[index.long()], weight, sizes), dtype=TOLERANCE.get(dtype, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient(interpreted, case, dtype):
    """Also of experts without rows, whose gradient is zero."""
    sizes, D, N = case
    grad, rows = random(sum(sizes), N, dtype=dtype), random(sum(sizes), D, dtype=dtype)
    parts = zip(grad.double().split(sizes), rows.double().split(sizes), strict=True)
    expected = torch.stack([g.t() @ x for g, x in parts])
    found = interpreted("triton_grouped_gemm", "weight_gradient", grad, rows, ends_of(sizes), constants=SMALL)
    assert found.dtype == dtype
    assert_close(found, expected, dtype=TOLERANCE.get(dtype, dtype))
    for accumulate in (True, False):
        main_grad = random(len(sizes), N, D, dtype=torch.float32)
        found = interpreted(
            *("triton_grouped_gemm", "weight_gradient", grad, rows, ends_of(sizes), main_grad, accumulate),
            constants=SMALL,
        )
        assert_close(found, expected + main_grad.double() * accumulate, dtype=torch.float32)


@pytest.mark.parametrize("sizes", [[5, 0, 33, 16], [0], [16, 16], [1] * 40, [0, 0, 100]], ids=str)
def test_tile_map(interpreted, sizes):
    """Every row is in exactly one tile, that of its expert."""
    count, rows, limits, experts = interpreted("triton_grouped_gemm", "tile_map", ends_of(sizes), sum(sizes), 16)
    ends = ends_of(sizes).tolist()
    expected = [
        (row, end, expert)
        for expert, (size, end) in enumerate(zip(sizes, ends, strict=True))
        for row in range(end - size, end, 16)
    ]
    assert_same(count, torch.tensor([len(expected)], dtype=torch.int32))
    found = [column[: len(expected)].tolist() for column in (rows, limits, experts)]
    assert list(zip(*found, strict=True)) == expected


@pytest.mark.parametrize("shared_memory", [232_448, 101_376], ids=["Hopper", "consumer Blackwell"])
def test_tiles_fit_into_shared_memory(shared_memory):
    """The stages of both factors, and the result on its way out."""
    from megatron_xmoe.kernels.triton_grouped_gemm import tile_of

    tile = tile_of(True, 2, shared_memory)
    factors = tile["num_stages"] * (tile["BM"] + tile["BN"]) * tile["BK"]
    assert 2 * (factors + tile["BM"] * tile["BN"]) <= shared_memory
