"""The Triton kernels in Triton's interpreter, on the CPU, against loops: movement and routing bit for bit.

The interpreter rounds to 16 bits by cutting off: sums in bf16 and fp16 are checked by tolerance here, and bit for bit
on a GPU.
"""

import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import oracles
import pytest
import torch
from map_cases import random_map, random_places
from tolerances import assert_close, assert_same
from torch import Tensor

from megatron_xmoe.ops.activation import Activation

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INDEX_DTYPES = [torch.int32, torch.int64]
TOLERANCE = {torch.float16: torch.bfloat16}  # compared with the tolerance of another type
# so that few routes and experts already take several programs and several steps of each
SMALL = {"ROUTES": 16, "MAX_PROGRAMS": 4, "TILE": 64, "FEWEST_BINS": 8, "SEGMENT": 16}

# name -> (choices [T][K], number of experts); -1 is a choice not made
CHOICES = {
    "plain": ([[3, 1, 0], [2, 3, 4], [0, 4, 1], [1, 0, 2], [4, 2, 3], [3, 0, 1], [1, 2, 4]], 5),
    "zero tokens": ([], 3),
    "K = 0": ([[], []], 3),
    "one expert": ([[0], [0], [0], [0]], 1),
    "K = E": ([[2, 0, 1], [0, 1, 2], [1, 2, 0], [2, 1, 0]], 3),
    "all to one expert": ([[2], [2], [2], [2], [2], [2]], 4),
    "missing": ([[1, -1, 3], [-1, -1, -1], [-1, 0, -1], [3, 2, 1], [-1, -1, 0]], 4),
    "none at all": ([[-1, -1], [-1, -1]], 2),
    "an expert twice": ([[1, 1], [0, 1], [1, 0], [0, 0]], 2),
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values, the same on every call."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def choices(name: str, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The named choices [T, K] and their number of experts."""
    rows, num_experts = CHOICES[name]
    return torch.tensor(rows, dtype=dtype).view(len(rows), len(rows[0]) if rows else 2), num_experts


def random_choices(tokens: int, per_token: int, num_experts: int) -> Tensor:
    """Unbalanced choices [T, K] int32, a tenth of them missing, some of the same expert twice."""
    generator = torch.Generator().manual_seed(tokens)
    favoured = torch.rand(tokens, per_token, generator=generator) ** 2
    ids = (favoured * num_experts).to(torch.int32)
    return torch.where(torch.rand(tokens, per_token, generator=generator) < 0.1, -1, ids)


def dropped(ids: Tensor, weights: Tensor, num_experts: int, capacity: int, by_weight: bool) -> list[list[int]]:
    """The choices with those above the capacity replaced by -1."""
    result = ids.tolist()
    for expert in range(num_experts):
        routes = [(t, k) for t, row in enumerate(ids.tolist()) for k, choice in enumerate(row) if choice == expert]
        if by_weight:
            routes.sort(key=lambda route: -weights[route].item())  # stable: the earliest first among equals
        for t, k in routes[capacity:] if capacity >= 0 else ():
            result[t][k] = -1
    return result


def check_routes(found: tuple[Tensor, ...], ids: Tensor, weights: Tensor, num_experts: int, *dropping) -> None:
    """Compares with the loops, also what comes after the last kept route."""
    expected = oracles.routes(dropped(ids, weights, num_experts, *dropping), num_experts)
    padding = ids.numel() - len(expected.token_ids)
    picked = [weights[place] for place in zip(expected.token_ids, expected.slots, strict=True)]
    assert_same(found[0], torch.tensor(expected.token_ids + [-1] * padding, dtype=torch.int32))
    assert_same(found[1], torch.tensor(expected.expert_ids + [-1] * padding, dtype=torch.int32))
    assert_same(found[2], torch.tensor(expected.tokens_per_expert))
    assert_same(found[3], torch.stack([*picked, *weights.new_zeros(padding)]) if ids.numel() else weights.view(0))
    assert_same(found[4], torch.tensor(expected.inverse, dtype=torch.int32).view(ids.shape))


@pytest.mark.parametrize(("capacity", "by_weight"), [(-1, True), (0, True), (2, True), (2, False), (2**40, True)])
@pytest.mark.parametrize("name", CHOICES)
def test_routes(interpreted, name, capacity, by_weight):
    for index_dtype, dtype in zip(INDEX_DTYPES, (torch.float32, torch.bfloat16), strict=True):
        ids, num_experts = choices(name, index_dtype)
        weights = random(*ids.shape, dtype=dtype)
        found = interpreted("triton_routes", "build_routes", ids, weights, num_experts, capacity, by_weight)
        check_routes(found, ids, weights, num_experts, capacity, by_weight)


@pytest.mark.parametrize(("capacity", "by_weight"), [(-1, False), (9, False), (9, True)])
def test_routes_of_many_programs(interpreted, capacity, by_weight):
    for tokens, per_token, num_experts in ((80, 3, 11), (33, 1, 40)):
        ids = random_choices(tokens, per_token, num_experts)
        weights = random(*ids.shape)
        found = interpreted(
            "triton_routes", "build_routes", ids, weights, num_experts, capacity, by_weight, constants=SMALL
        )
        check_routes(found, ids, weights, num_experts, capacity, by_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_weights_are_kept_and_of_equal_ones_the_earliest(interpreted, dtype):
    """Weights that differ in the first, a middle or only the last bit; both zeros are equal."""
    tiny, one, step = torch.finfo(dtype).tiny, 1.0, torch.finfo(dtype).eps
    values = [0.0, -0.0, one, one + step, -one, -one - step, tiny, -tiny, math.inf, -math.inf, 1.5, 0.0, one]
    order = torch.randperm(3 * len(values), generator=torch.Generator().manual_seed(3))
    weights = torch.tensor(values * 3, dtype=dtype)[order].view(-1, 1)
    ids = torch.zeros(weights.shape, dtype=torch.int32)
    for capacity in (1, 8, 14, 20, 27, 38, 39):
        found = interpreted("triton_routes", "build_routes", ids, weights, 1, capacity, True, constants=SMALL)
        check_routes(found, ids, weights, 1, capacity, True)


def test_more_experts_than_registers_hold_are_refused(interpreted):
    ids, counts = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 5000, dtype=torch.int64)
    with pytest.raises(ValueError, match="5000 experts .*4096.*--xmoe-kernels"):
        interpreted("triton_routes", "build_routes", ids, torch.ones(1, 1), 5000, -1, False)
    with pytest.raises(ValueError, match="5000 experts"):
        interpreted("triton_routes", "merge_order", counts, 0)


# tokens, experts, choices
MAPS = [(0, 3, 2), (4, 1, 1), (5, 3, 3), (40, 70, 5), (3, 4, 0), (3, 1100, 6), (9, 12, 12)]


@pytest.mark.parametrize("constants", [{}, {"TILE": 64, "MOST_COLUMNS": 16}], ids=["one tile", "several tiles"])
@pytest.mark.parametrize("shape", MAPS)
def test_choices_of_a_map(interpreted, shape, constants):
    routing_map, expected = random_map(*shape)
    for dtype in DTYPES:
        probs = random(*routing_map.shape, dtype=dtype)
        given = routing_map, probs, shape[2]
        ids, weights = interpreted("triton_choices", "choices_of_map", *given, constants=constants)
        assert_same(ids, expected)
        assert_same(weights, torch.where(ids < 0, 0, probs.gather(1, ids.clamp_min(0).long())))


@pytest.mark.parametrize("constants", [{}, {"TILE": 64, "MOST_COLUMNS": 16}], ids=["one tile", "several tiles"])
@pytest.mark.parametrize("shape", MAPS)
def test_gradient_of_a_map(interpreted, shape, constants):
    ids = random_map(*shape)[1]
    inverse = random_places(ids)
    for dtype in DTYPES:
        grad = random(ids.numel(), dtype=dtype)
        found = interpreted("triton_choices", "gradient_of_map", grad, inverse, ids, shape[1], constants=constants)
        assert_same(found, oracles.gradient_of_map(grad, inverse, ids, shape[1]))


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 4, 9), (5, 7, 2), (2, 40, 30), (33, 5, 4), (3, 2, 0)])
@pytest.mark.parametrize("constants", [{}, {"TILE": 512}], ids=["one step", "several steps"])
def test_merge_order(interpreted, shape, constants):
    sources, experts, most = shape
    counts = torch.randint(0, most + 1, (sources, experts), generator=torch.Generator().manual_seed(1))
    counts[-1] *= 3  # more rows than its share of programs
    arriving = [(e, g, i) for g in range(sources) for e in range(experts) for i in range(counts[g, e])]
    order = sorted(range(len(arriving)), key=lambda position: arriving[position])
    to_expert, to_arrival = interpreted(
        "triton_routes", "merge_order", counts, len(arriving), constants=constants
    )
    assert to_expert.tolist() == order
    assert to_arrival[to_expert.long()].tolist() == list(range(len(arriving)))
    assert to_expert.dtype == to_arrival.dtype == torch.int32


# tokens, routes of each, hidden size
SHAPES = [(5, 3, 40), (3, 1, 7), (3, 17, 33), (2, 2, 1500), (9, 2, 16), (0, 2, 8), (4, 0, 8), (3, 2, 0), (70, 2, 1)]


def layout(shape: tuple[int, int, int], dtype: torch.dtype, index_dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows and index arrays in which a fifth of the routes are missing, and some rows belong to nobody."""
    tokens, per_token, hidden = shape
    generator = torch.Generator().manual_seed(sum(shape))
    count = tokens * per_token + 3
    index = torch.randperm(count, generator=generator)[: tokens * per_token].view(tokens, per_token)
    index = torch.where(torch.rand(index.shape, generator=generator) < 0.2, -1, index)
    owners = torch.full((count,), -1)
    for t, row in enumerate(index.tolist()):
        owners[[i for i in row if i >= 0]] = t
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": random(tokens, hidden, dtype=dtype),
        "y": random(count, hidden, dtype=dtype, seed=1),
        "index": index.to(index_dtype),
        "owners": owners.to(index_dtype),
        "weights": random(tokens, per_token, dtype=wide, seed=2),
    }


def in_both_index_types(dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Layouts of all shapes, with the index types in turn."""
    for shape, index_dtype in zip(SHAPES, itertools.cycle(INDEX_DTYPES)):
        yield layout(shape, dtype, index_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_rows(interpreted, dtype):
    for data in in_both_index_types(dtype):
        x = data["y"].clone()
        x.view(-1)[:2] = torch.tensor([-0.0, math.nan])[: x.numel()]
        repeated = torch.cat([data["index"].reshape(-1), data["index"].reshape(-1)[:3]])
        assert_same(interpreted("triton_rows", "gather_rows", x, repeated), oracles.gather(x, repeated))
    nothing = torch.full((3,), -1)
    assert_same(interpreted("triton_rows", "gather_rows", x[:0], nothing), x.new_zeros(3, x.shape[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spread_rows(interpreted, dtype):
    for data in in_both_index_types(dtype):
        x, y, index, owners, weights = data.values()
        moved = oracles.gather(x, owners) if len(x) else x.new_zeros(len(owners), x.shape[1])
        rows, none = interpreted("triton_rows", "spread_rows", x, index, owners, None, None)
        assert_same(rows, moved)
        assert none is None

        scale = weights.new_zeros(len(owners), 1)
        scale[index[index >= 0].long(), 0] = weights[index >= 0]
        dots = expected_dots(y, index, x)
        for given, other in itertools.product((None, weights), (None, y)):
            rows, found = interpreted("triton_rows", "spread_rows", x, index, owners, given, other)
            if given is None:
                assert_same(rows, moved)
            else:
                assert_close(rows, moved.to(scale.dtype) * scale, TOLERANCE.get(dtype, dtype))
                assert (rows[owners < 0] == 0).all()
            if other is not None:
                assert_close(found, dots, weights.dtype)
                assert found.dtype == weights.dtype
        assert_same(interpreted("triton_rows", "dot_rows", y, index, x), found)


def expected_dots(y: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Row dot products in float64, 0 for none."""
    rows = [[y[i].double() @ x[t].double() if i >= 0 else 0.0 for i in row] for t, row in enumerate(index.tolist())]
    return torch.tensor(rows, dtype=torch.float64).view(index.shape)


def test_no_row_is_nothing_even_next_to_infinity(interpreted):
    index, infinite = torch.tensor([[-1, 0]]), torch.tensor([[math.inf, 1.0]])
    y = torch.ones(1, 4)
    dots = interpreted("triton_rows", "dot_rows", y, index, torch.full((1, 4), math.inf))
    assert dots.tolist() == [[0.0, math.inf]]
    assert interpreted("triton_rows", "sum_rows", y, index, infinite, None).tolist() == [[1.0] * 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summed_rows(interpreted, dtype):
    for data in in_both_index_types(dtype):
        _, y, index, _, weights = data.values()
        for given in (None, weights):
            exact = oracles.gather_sum(y.double(), index, None if given is None else given.double())
            found = interpreted("triton_rows", "sum_rows", y, index, given, None)
            assert_close(found, exact, TOLERANCE.get(dtype, dtype))
            assert found.dtype == dtype
            flat, offsets = index.reshape(-1), torch.arange(len(index) + 1) * index.shape[1]
            given = None if given is None else given.reshape(-1)
            assert_same(interpreted("triton_rows", "sum_rows", y, flat, given, offsets), found)


def test_sums_of_lists_of_different_lengths(interpreted):
    y, weights = random(6, 20), random(16)
    index = torch.tensor([5, 4, 3, -1, 3, 0, 1, 2, 0, 0, 1, 4, 2, 5, 5, 1])
    offsets = torch.tensor([1, 1, 4, 13, 13, 15])  # positions before the first and after the last belong to nobody
    expected = torch.zeros(5, 20, dtype=torch.float64)
    for t, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        for p in range(begin, end):
            if index[p] >= 0:
                expected[t] += y[index[p]].double() * weights[p].double()
    assert_close(interpreted("triton_rows", "sum_rows", y, index, weights, offsets), expected, torch.float32)


def test_sums_run_from_the_first_route_to_the_last(interpreted):
    """In fp32, 2**24 + 1 is 2**24: the result tells the order."""
    y = torch.tensor([[2.0**24], [1.0], [1.0], [-(2.0**24)]])
    for order, expected in (([0, 1, 2, 3], 0.0), ([1, 2, 0, 3], 2.0), ([0, 3, 1, 2], 2.0), ([1, 0, 2, 3], 0.0)):
        assert interpreted("triton_rows", "sum_rows", y, torch.tensor([order]), None, None).tolist() == [[expected]]


@pytest.mark.parametrize("warp", [32, 64])
def test_launch_parameters_are_what_triton_takes(warp):
    """Tiles are powers of two below Triton's limit of elements, and a block of threads is at most 1024."""
    from megatron_xmoe.kernels import triton_choices, triton_rotary, triton_routes, triton_rows

    tiles = [
        rule
        for hidden, dtype, per_token in itertools.product((1, 7, 64, 2048, 7168, 10**6), DTYPES, (0, 1, 6, 8, 64, 1000))
        for rule in (
            triton_rows.gather_tile(hidden, dtype, warp),
            triton_rows.sum_tile(hidden, per_token, dtype, warp),
            triton_rows.sum_tile(hidden, None, dtype, warp),
            *(triton_rows.spread_tile(hidden, per_token, dtype, warp, dot) for dot in (False, True)),
        )
    ]
    for experts, count in itertools.product((1, 3, 64, 128, 1000, 4096), (1, 1000, 10**6)):
        tiles += [triton_routes.places_tile(count, experts), triton_routes.select_tile(experts)]
        tiles += [triton_choices.choices_tile(experts), triton_routes.merge_tile(experts)]
    for heads, (size, rotated) in itertools.product((1, 3, 128), ((2, 2), (128, 128), (96, 50), (5000, 4000))):
        tiles.append(triton_rotary.rotate_tile(heads, size, rotated, warp))
    for tile in tiles:
        sizes = {name: value for name, value in tile.items() if name.isupper() and isinstance(value, int)}
        assert all(value > 0 and (name == "UNROLL" or value & (value - 1) == 0) for name, value in sizes.items()), tile
        assert tile["num_warps"] * warp <= 1024 and tile["num_warps"] & (tile["num_warps"] - 1) == 0, tile
        assert math.prod(sizes.get(name, 1) for name in ("TOKENS", "ROUTES", "BLOCK")) <= 2**20, tile
        assert math.prod(sizes.get(name, 1) for name in ("ROWS", "BINS", "HEADS", "PAIRS")) <= 2**20, tile


def test_the_compile_tool_knows_every_kernel():
    """What tools/compile_triton.py would compile covers all kernels, for every target; it finds a new one."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
    try:
        import compile_triton
    finally:
        sys.path.pop(0)
    from megatron_xmoe.kernels import triton_rows

    for target in compile_triton.TARGETS:
        launches = compile_triton.launches(target)
        assert {(launch.module, launch.kernel) for launch in launches} == compile_triton.kernels()
    with mock.patch.object(triton_rows, "new_kernel", triton_rows.sum_kernel, create=True):
        assert (triton_rows.__name__, "new_kernel") in compile_triton.kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("kind", ["silu", "gelu", "squared_relu"])
def test_activation(interpreted, kind, gated, dtype):
    functions = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "squared_relu": squared_relu}
    activation = Activation(functions[kind], gated)
    for rows, columns in ((6, 300), (1, 7), (0, 8)):
        hidden = random(rows, columns * (2 if gated else 1), dtype=dtype)
        weights, grad = random(rows).double(), random(rows, columns, dtype=dtype, seed=1)
        # bf16 results are cut off in the interpreter, so an error of one part in 128 is theirs
        bound = {} if dtype == torch.float32 else {"dtype": torch.bfloat16}
        found = interpreted("triton_activation", "activate", hidden, weights.float(), kind, gated)
        assert_close(found, activation.forward(hidden.double(), weights.float().double()), **bound)
        back = interpreted("triton_activation", "activate_backward", hidden, weights.float(), grad, kind, gated)
        expected = activation.backward(hidden.double(), weights.float().double(), grad.double())
        assert_close(back[0], expected[0], **bound)
        assert_close(back[1], expected[1], **bound)
        assert_close(back[2], expected[2], torch.float32)


def squared_relu(x: Tensor) -> Tensor:
    return x.clamp_min(0).square()
