"""The compiled CPU kernels against loops: movement and routing bit for bit, sums and dot products by tolerance."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import oracles
import pytest
import torch
from map_cases import random_map, random_places
from tolerances import assert_close, assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_xmoe import _optional
from megatron_xmoe.kernels import cpp
from megatron_xmoe.kernels.reference import accumulator
from megatron_xmoe.ops import build_routes_from_map

_FOUND = _optional.extension("cpu")
pytestmark = pytest.mark.skipif(not _FOUND.usable, reason=f"megatron_xmoe._C: {_FOUND.reason}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INDEX_DTYPES = [torch.int32, torch.int64]
TOLERANCE = {torch.float16: torch.bfloat16}  # compared with the tolerance of another type
# tokens, experts, choices
MAPS = [(50, 20, 3), (0, 4, 2), (5, 4, 0), (5, 4, 4), (9, 1, 1), (300, 300, 8), (40, 70, 70)]
# past blocks of 2048 columns, around vectors of 64 bytes, and what a streaming store needs
WIDTHS = [0, 1, 7, 16, 33, 128, 1023, 2048, 2049, 4500]


@pytest.fixture(autouse=True)
def poisoned_results() -> Iterator[None]:
    """Memory that C++ allocates is filled with NaN, too."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    """torch's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values, the same on every call."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def shifted(x: Tensor) -> Tensor:
    """The same contiguous tensor one element off the start of its memory, so that nothing is aligned."""
    storage = x.new_zeros(x.numel() + 1)
    storage[1:] = x.reshape(-1)
    return storage[1:].view(x.shape)


def choices(T: int, K: int, E: int, missing: float = 0.2, seed: int = 0) -> Tensor:
    """Random experts [T, K] int64, the same expert twice in a token now and then, and -1 for some."""
    generator = torch.Generator().manual_seed(seed + T)
    ids = torch.randint(0, E, (T, K), generator=generator)
    return ids.masked_fill(torch.rand(T, K, generator=generator) < missing, -1)


def permutation(T: int, K: int, R: int, dtype: torch.dtype, missing: float = 0.2) -> tuple[Tensor, Tensor]:
    """index [T, K] that names no row of R twice, and owners [R]."""
    generator = torch.Generator().manual_seed(T * K + R)
    rows = torch.randperm(R, generator=generator)[: T * K]
    rows = torch.cat([rows, rows.new_full((T * K - rows.numel(),), -1)])
    index = rows.masked_fill(torch.rand(T * K, generator=generator) < missing, -1).view(T, K)
    owners = torch.full((R,), -1)
    for t, named in enumerate(index.tolist()):
        owners[[row for row in named if row >= 0]] = t
    return index.to(dtype), owners.to(dtype)


def spread_oracle(x: Tensor, index: Tensor, rows: int, weights: Tensor | None) -> Tensor:
    """Row by row, one product rounded once to x's dtype."""
    result = torch.zeros(rows, x.shape[1], dtype=x.dtype)
    for t, named in enumerate(index.tolist()):
        for k, row in enumerate(named):
            if row >= 0:
                result[row] = x[t] if weights is None else (x[t].to(weights.dtype) * weights[t, k]).to(x.dtype)
    return result


def dots_oracle(y: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Row dot products in fp64."""
    result = torch.zeros(index.shape, dtype=torch.float64)
    for t, named in enumerate(index.tolist()):
        for k, row in enumerate(named):
            if row >= 0:
                result[t, k] = sum((y[row].double() * x[t].double()).tolist())
    return result


def routes_oracle(ids: Tensor, weights: Tensor, E: int, capacity: int, by_weight: bool) -> list[Tensor]:
    """The five results in plain Python."""
    K = ids.shape[1]
    flat = ids.reshape(-1).tolist()
    values = weights.double().reshape(-1).tolist()
    kept = []
    for expert in range(E):
        found = [p for p, chosen in enumerate(flat) if chosen == expert]
        if capacity >= 0:
            best = sorted(found, key=lambda p: (-values[p], p)) if by_weight else found
            found = sorted(best[:capacity])
        kept.append(found)
    order = [p for found in kept for p in found]
    rest = len(flat) - len(order)
    inverse = torch.full((len(flat),), -1, dtype=torch.int32)
    inverse[order] = torch.arange(len(order), dtype=torch.int32)
    combine_weights = torch.cat([weights.reshape(-1)[order], weights.new_zeros(rest)])
    return [
        torch.tensor([p // K for p in order] + [-1] * rest, dtype=torch.int32),
        torch.tensor([flat[p] for p in order] + [-1] * rest, dtype=torch.int32),
        torch.tensor([len(found) for found in kept]),
        combine_weights,
        inverse.view(ids.shape),
    ]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_rows(dtype, width, threads):
    x = random(9, width, dtype=dtype)
    index = torch.tensor([3, -1, 3, 8, 0, -1, 5])
    for index_dtype in INDEX_DTYPES:
        expected = oracles.gather(x, index)
        assert_same(cpp.gather_rows(x, index.to(index_dtype)), expected)
        assert_same(cpp.gather_rows(shifted(x), shifted(index.to(index_dtype))), expected)


@pytest.mark.parametrize("width", [2**15 + 5, 2**15 + 16])
def test_large_results_are_stored_past_the_caches(width, threads):
    """Results above 4 MiB take streaming stores, whose first and last bytes are stored otherwise."""
    x = random(3, width)
    index, owners = permutation(3, 20, 66, torch.int32)
    gathered = owners.clamp_min(-1)
    assert gathered.numel() * width * 4 > 8 << 20
    assert_same(cpp.gather_rows(x, gathered), torch.where(gathered[:, None] < 0, 0, x[gathered.clamp_min(0).long()]))
    weights = random(3, 20, seed=1)
    for given in (None, weights):
        rows, _ = cpp.spread_rows(shifted(x), index, owners, given, None)
        assert_same(rows, spread_oracle(x, index, 66, given))
    copied = cpp.sum_rows(x, gathered.unsqueeze(1), None, None)
    assert_same(copied, torch.where(gathered[:, None] < 0, 0, x[gathered.clamp_min(0).long()]))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_spread_rows(dtype, width, threads):
    x = random(6, width, dtype=dtype)
    y = random(20, width, dtype=dtype, seed=2)
    weights = random(6, 3, dtype=accumulator(dtype), seed=1)
    for index_dtype in INDEX_DTYPES:
        index, owners = permutation(6, 3, 20, index_dtype)
        for given in (None, weights):
            expected = spread_oracle(x, index, 20, given)
            rows, dots = cpp.spread_rows(x, index, owners, given, None)
            assert dots is None
            assert_same(rows, expected)
            rows, dots = cpp.spread_rows(shifted(x), index, owners, given, shifted(y))
            assert_same(rows, expected)
            assert dots.dtype == accumulator(dtype)
            assert_close(dots, dots_oracle(y, index, x))


@pytest.mark.parametrize("per_token", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_rows(dtype, per_token, threads):
    for width in WIDTHS:
        y = random(11, width, dtype=dtype)
        index = choices(7, per_token, 11)  # repeats a row now and then
        weights = random(7, per_token, dtype=accumulator(dtype), seed=1)
        for given in (None, weights):
            expected = oracles.gather_sum(y.double(), index, None if given is None else given.double())
            for index_dtype in INDEX_DTYPES:
                found = cpp.sum_rows(shifted(y), index.to(index_dtype), given, None)
                assert found.dtype == dtype
                assert_close(found, expected, TOLERANCE.get(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_rows_of_flat_lists(dtype):
    y = random(11, 40, dtype=dtype)
    lengths = [3, 0, 1, 6, 0, 2]
    index = choices(1, 2 + sum(lengths) + 1, 11).view(-1)
    offsets = 2 + torch.tensor([0, *lengths]).cumsum(0)  # neither the first two positions nor the last are used
    weights = random(index.numel(), dtype=accumulator(dtype), seed=1)
    for given in (None, weights):
        parts = [slice(first, last) for first, last in zip(offsets[:-1], offsets[1:], strict=True)]
        expected = torch.cat([
            oracles.gather_sum(y.double(), index[None, part], None if given is None else given.double()[None, part])
            for part in parts
        ])
        for index_dtype in INDEX_DTYPES:
            found = cpp.sum_rows(y, index.to(index_dtype), given, offsets)
            assert_close(found, expected, TOLERANCE.get(dtype))


@pytest.mark.parametrize("per_token", [0, 1, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_rows(dtype, per_token, threads):
    for width in WIDTHS:
        y, x = random(11, width, dtype=dtype), random(7, width, dtype=dtype, seed=1)
        index = choices(7, per_token, 11)
        for index_dtype in INDEX_DTYPES:
            found = cpp.dot_rows(shifted(y), index.to(index_dtype), shifted(x))
            assert found.dtype == accumulator(dtype)
            assert_close(found, dots_oracle(y, index, x))


def test_a_dot_product_depends_on_nothing_but_its_rows():
    """spread_rows and dot_rows, whatever else the token has, give the same bits."""
    x, y = random(1, 777), random(9, 777, seed=1)
    (expected,) = cpp.dot_rows(y, torch.tensor([[4]]), x).view(-1).tolist()
    for row in ([0, 1, 4], [-1, 4, -1, -1, -1], [3, 1, 2, 0, 4, 8], [4, -1, 7, 5, 6]):
        index = torch.tensor([row])
        owners = torch.full((9,), -1)
        owners[[r for r in row if r >= 0]] = 0
        for dots in (cpp.dot_rows(y, index, x), cpp.spread_rows(x, index, owners, None, y)[1]):
            assert dots[index == 4].item() == expected
            assert (dots[index < 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_rounded_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = every[~every.isnan() & ~((every == 0) & every.signbit())].view(1, -1)  # a sum starts at +0
    assert_same(cpp.sum_rows(numbers, torch.zeros(1, 1, dtype=torch.int32), None, None), numbers)
    x = every.view(1, -1)
    zero = torch.zeros(1, dtype=torch.int32)
    for weight in (1 + 2**-8, 1 / 3, -0.7, 2**-9, 2**-14, 300.0):  # subnormal and infinite results, too
        weights = torch.full((1, 1), weight)
        rows, _ = cpp.spread_rows(x, zero.view(1, 1), zero, weights, None)
        expected = (x.float() * weight).to(dtype)
        assert torch.equal(rows.isnan(), expected.isnan())
        assert_same(rows.nan_to_num(7.0), expected.nan_to_num(7.0))
    ties = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]])
    assert_same(_rounded(ties, dtype), ties.to(dtype))


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers rounded by the kernel: as weights of a row of ones."""
    ones = torch.ones(1, 1, dtype=dtype)
    index = torch.arange(values.numel(), dtype=torch.int32)
    rows, _ = cpp.spread_rows(ones, index.view(1, -1), torch.zeros_like(index), values, None)
    return rows.view(1, -1)


@pytest.mark.parametrize("policy", [(-1, False), (3, False), (3, True), (0, False), (0, True), (1000, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "K", "E"), [(40, 3, 7), (0, 4, 5), (9, 0, 4), (30, 1, 1), (13, 6, 6), (25, 2, 300)], ids=str
)
def test_build_routes(T, K, E, dtype, policy, threads):
    ids = choices(T, K, E)
    weights = (random(T, K).sigmoid() * 8).round().div(8).to(dtype)  # many ties
    for index_dtype in INDEX_DTYPES:
        found = cpp.build_routes(ids.to(index_dtype), weights, E, *policy)
        for actual, expected in zip(found, routes_oracle(ids, weights, E, *policy), strict=True):
            assert_same(actual, expected)


def test_a_capacity_keeps_the_largest_weights_with_zero_infinity_and_nan():
    weights = torch.tensor([[-0.0], [0.0], [torch.inf], [-1.0], [torch.nan], [torch.inf]])
    ids = torch.zeros(6, 1, dtype=torch.int32)
    for capacity, kept in ((1, [4]), (2, [2, 4]), (3, [2, 4, 5]), (4, [0, 2, 4, 5]), (5, [0, 1, 2, 4, 5])):
        token_ids = cpp.build_routes(ids, weights, 1, capacity, True)[0]
        assert token_ids.tolist() == kept + [-1] * (6 - capacity)


@pytest.mark.parametrize("policy", [(-1, False), (900, False), (900, True)])
def test_build_routes_over_several_chunks(policy, threads):
    T, K, E = 7000, 4, 17
    ids, weights = choices(T, K, E), random(T, K).round(decimals=1)
    found = cpp.build_routes(ids, weights, E, *policy)
    for actual, expected in zip(found, routes_oracle(ids, weights, E, *policy), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_choices_of_map(shape, dtype, threads):
    routing_map, expected = random_map(*shape)
    probs = random(*routing_map.shape, dtype=dtype)
    ids, weights = cpp.choices_of_map(shifted(routing_map), shifted(probs), shape[2])
    assert_same(ids, expected)
    assert_same(weights, torch.where(ids < 0, 0, probs.gather(1, ids.clamp_min(0).long())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_gradient_of_map(shape, dtype, threads):
    ids = random_map(*shape)[1]
    inverse = random_places(ids)
    named = inverse[inverse >= 0].long()
    grad = torch.full((ids.numel(),), torch.nan, dtype=dtype).index_copy(0, named, random(len(named), dtype=dtype))
    found = cpp.gradient_of_map(shifted(grad), shifted(inverse), shifted(ids), shape[1])
    assert_same(found, oracles.gradient_of_map(grad, inverse, ids, shape[1]))


@pytest.mark.parametrize("counts", [[[2, 0, 3], [1, 4, 0]], [[5]], [[0, 0]], [[1], [2], [0]], [[3, 2, 0, 1]]], ids=str)
def test_merge_order(counts):
    arrival = [(e, g, i) for g, row in enumerate(counts) for e, n in enumerate(row) for i in range(n)]
    order = sorted(range(len(arrival)), key=lambda r: arrival[r])
    to_expert_order, to_arrival_order = cpp.merge_order(torch.tensor(counts), len(arrival))
    assert_same(to_expert_order, torch.tensor(order, dtype=torch.int32))
    assert to_arrival_order.dtype == torch.int32
    assert [order[p] for p in to_arrival_order.tolist()] == list(range(len(arrival)))


def test_results_do_not_depend_on_the_number_of_threads():
    T, K, E, H = 600, 6, 16, 520
    x, y, weights = random(T, H, dtype=torch.bfloat16), random(T * K, H, dtype=torch.bfloat16), random(T, K)
    ids = choices(T, K, E, missing=0)

    def everything() -> list[Tensor]:
        routes = cpp.build_routes(ids, weights, E, -1, True)
        token_ids, inverse = routes[0], routes[-1]
        return [
            *routes,
            cpp.gather_rows(x, token_ids),
            *cpp.spread_rows(x, inverse, token_ids, weights, y),
            cpp.sum_rows(y, inverse, weights, None),
            cpp.dot_rows(y, inverse, x),
        ]

    before = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            runs.append(everything())
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for actual, expected in zip(run, runs[0], strict=True):
            assert_same(actual, expected)


I32 = torch.int32
MAP = torch.ones(2, 3, dtype=torch.bool)
BAD: dict[str, tuple[Callable, type[Exception], str]] = {
    "index too large": (lambda: cpp.gather_rows(random(3, 4), torch.tensor([3])), IndexError, "index 3 .* 3 row"),
    "no rows": (lambda: cpp.gather_rows(random(0, 4), torch.tensor([0])), IndexError, "0 row"),
    "index of floats": (lambda: cpp.gather_rows(random(3, 4), random(2)), ValueError, "int32 or int64"),
    "integer rows": (lambda: cpp.gather_rows(torch.ones(3, 4, dtype=I32), torch.tensor([0])), ValueError, "float32"),
    "not contiguous": (lambda: cpp.gather_rows(random(4, 3).t(), torch.tensor([0])), ValueError, "contiguous"),
    "a vector": (lambda: cpp.gather_rows(random(4), torch.tensor([0])), ValueError, "2 dimension"),
    "expert too large": (
        lambda: cpp.build_routes(torch.tensor([[4]]), random(1, 1), 4, -1, False), IndexError, "num_experts, 4"
    ),
    "no expert": (lambda: cpp.build_routes(torch.tensor([[0]]), random(1, 1), 0, -1, False), ValueError, "at least 1"),
    "shapes": (lambda: cpp.build_routes(torch.tensor([[0]]), random(1, 2), 1, -1, False), ValueError, "same shape"),
    "bf16 weights": (
        lambda: cpp.sum_rows(random(3, 4), torch.tensor([[0]]), random(1, 1, dtype=torch.bfloat16), None),
        ValueError, "accumulator",
    ),
    "descending": (
        lambda: cpp.sum_rows(random(3, 4), torch.tensor([0, 1]), None, torch.tensor([0, 2, 1])), ValueError, "ascend"
    ),
    "past the end": (
        lambda: cpp.sum_rows(random(3, 4), torch.tensor([0, 1]), None, torch.tensor([0, 3])), ValueError, "ascend"
    ),
    "owners": (
        lambda: cpp.spread_rows(random(1, 4), torch.tensor([[0]]), torch.tensor([0], dtype=I32), None, None),
        ValueError, "same dtype",
    ),
    "y of another width": (
        lambda: cpp.spread_rows(random(1, 4), torch.tensor([[0]]), torch.tensor([0]), None, random(1, 5)),
        ValueError, "y must be",
    ),
    "another length": (lambda: cpp.dot_rows(random(3, 4), torch.tensor([[0]]), random(2, 4)), ValueError, "x must"),
    "counts": (lambda: cpp.merge_order(torch.tensor([[1, 2]]), 4), ValueError, "sum to 3"),
    "map of numbers": (lambda: cpp.choices_of_map(random(2, 3), random(2, 3), 1), ValueError, "must be bool"),
    "map and probs": (lambda: cpp.choices_of_map(MAP, random(2, 4), 1), ValueError, "same shape"),
    "more choices than experts": (lambda: cpp.choices_of_map(MAP, random(2, 3), 4), ValueError, "K is 4.* experts, 3"),
    "integer probs": (lambda: cpp.choices_of_map(MAP, torch.ones(2, 3, dtype=I32), 1), ValueError, "float32"),
    "long places": (
        lambda: cpp.gradient_of_map(random(2), *(torch.zeros(2, 1, dtype=torch.int64),) * 2, 3), ValueError, "int32"
    ),
    "a place too large": (
        lambda: cpp.gradient_of_map(random(1), torch.ones(1, 1, dtype=I32), torch.zeros(1, 1, dtype=I32), 3),
        IndexError, r"index 1 .* 1 route",
    ),
    "a choice too large": (
        lambda: cpp.gradient_of_map(random(1), torch.zeros(1, 1, dtype=I32), torch.full((1, 1), 3, dtype=I32), 3),
        IndexError, r"index 3 .* 3 expert",
    ),
    "negative counts": (lambda: cpp.merge_order(torch.tensor([[-1, 5]]), 4), ValueError, "negative"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


OPERATOR_ARGUMENTS = {
    "build_routes": (choices(10, 3, 4), random(10, 3), 4, 2, True),
    "choices_of_map": (choices(10, 3, 4) > 0, random(10, 3, dtype=torch.bfloat16), 2),
    "gradient_of_map": (random(20, dtype=torch.float64), *(choices(10, 2, 4).to(I32),) * 2, 4),
    "merge_order": (torch.tensor([[2, 0], [1, 3]]), 6),
    "gather_rows": (random(5, 8), torch.tensor([4, -1, 0])),
    "spread_rows": (
        *(random(4, 8), *permutation(4, 2, 9, torch.int64), random(4, 2), random(9, 8)),
    ),
    "sum_rows": (random(5, 8, dtype=torch.bfloat16), choices(3, 2, 5), random(3, 2), None),
    "dot_rows": (random(5, 8), choices(3, 2, 5), random(3, 8)),
}


@pytest.mark.parametrize("name", OPERATOR_ARGUMENTS)
def test_operators_are_registered_as_torch_wants(name):
    """Schema, fake version and dispatch, also with sizes that vary under torch.compile."""
    cpp._register()
    torch.library.opcheck(getattr(torch.ops.megatron_xmoe, name).default, OPERATOR_ARGUMENTS[name])
    assert getattr(cpp, name)(*OPERATOR_ARGUMENTS[name]) is not None


def test_optional_arguments_pass_opcheck():
    index, owners = permutation(4, 2, 9, torch.int32)
    cpp._register()
    torch.library.opcheck(torch.ops.megatron_xmoe.spread_rows.default, (random(4, 8), index, owners, None, None))
    flat = (random(5, 8), torch.tensor([0, 3, 1]), None, torch.tensor([0, 2, 3]))
    torch.library.opcheck(torch.ops.megatron_xmoe.sum_rows.default, flat)


def test_meta_tensors_and_compilation():
    x, index = random(5, 8), torch.tensor([4, -1, 0])
    assert cpp.gather_rows(x.to("meta"), index.to("meta")).shape == (3, 8)
    compiled = torch.compile(lambda x, index: cpp.gather_rows(x + 1, index) * 2, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, index), oracles.gather(x + 1, index) * 2)


def test_routes_from_a_map_are_few_operations(monkeypatch):
    """On a GPU each is one launch or a few, which the host has to make before the counts can be exchanged."""
    monkeypatch.setenv("XMOE_KERNELS", "cpp")
    called = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.name())
            return function(*args, **kwargs or {})

    routing_map, _ = random_map(12, 6, 3)
    probs, grad = random(12, 6).requires_grad_(), random(36)
    with Operations():
        weights = build_routes_from_map(routing_map, probs, 3, 2).combine_weights
        assert called == ["megatron_xmoe::choices_of_map", "megatron_xmoe::build_routes"]
        called.clear()
        torch.autograd.grad(weights, probs, grad)
    assert called == ["megatron_xmoe::gradient_of_map"]


@pytest.mark.parametrize("most", ["SSE2", "AVX2"])
def test_smaller_instruction_sets(most):
    """XMOE_CPU is read once in a process, so the tests of this file run again in another."""
    if "XMOE_CPU" in os.environ:
        pytest.skip("this is that other process")
    facts = "import torch; from megatron_xmoe import _optional; print(_optional.extension_facts()['cpu'])"
    environment = os.environ | {"XMOE_CPU": most}
    root = Path(__file__).resolve().parents[2]
    run = [sys.executable, "-c", facts]
    used = subprocess.run(run, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    if used != most:
        pytest.skip(f"this machine has {used} at most")
    some = "gather or spread or sum or dot or large or 16_bit"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", some, __file__]
    done = subprocess.run(run, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
