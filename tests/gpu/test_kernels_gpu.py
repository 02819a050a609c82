"""Compiled kernels on a GPU against the reference on the CPU, which the unit tests hold against loops.

Movement and routing are compared bit for bit, sums and dot products with fp64. Not run by CI, which has no GPU.
"""

import pytest
import torch
from tolerances import assert_close, assert_same

from megatron_xmoe.kernels import reference
from megatron_xmoe.kernels.registry import candidates, implementation

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float16: torch.bfloat16}  # compared with the tolerance of another type

# tokens, experts per token, experts, hidden size
SHAPES = {
    "plain": (300, 6, 64, 256),
    "H odd": (100, 4, 10, 33),
    "H 1": (257, 3, 7, 1),
    "one expert": (65, 1, 1, 40),
    "K = E": (50, 8, 8, 72),
    "many experts": (700, 8, 1000, 24),
    "most experts": (300, 2, 2048, 8),
    "many tokens": (20000, 8, 128, 16),
    "wide": (40, 8, 16, 7168),
    "zero tokens": (0, 4, 8, 64),
}


@pytest.fixture(params=["cpp", "triton"])
def backend(request):
    (found,) = (c for c in candidates("cuda") if c.name == request.param)
    if not found.usable:
        pytest.skip(f"{found.name}: {found.reason}")
    return lambda operation: implementation(request.param, operation)


def choices(T, K, E, seed=0, missing=0.1):
    """Unbalanced choices [T, K] with some missing, and weights [T, K] with many ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(T, E, generator=generator) + torch.randn(E, generator=generator)
    ids = scores.topk(K, dim=1).indices
    ids = torch.where(torch.rand(T, K, generator=generator) < missing, -1, ids)
    return ids, torch.randint(-5, 6, (T, K), generator=generator) / 4


def on_gpu(value):
    return value.cuda() if torch.is_tensor(value) else value


def both(backend, operation, *args):
    """Results of the backend on the GPU, twice, and of the reference on the CPU."""
    found = backend(operation)(*map(on_gpu, args))
    again = backend(operation)(*map(on_gpu, args))
    expected = getattr(reference, operation)(*args)
    as_tuple = [x if isinstance(x, tuple) else (x,) for x in (found, again, expected)]
    for a, b in zip(*as_tuple[:2], strict=True):
        assert (a is None and b is None) or torch.equal(a.cpu(), b.cpu()), "two calls differ"
    return zip(as_tuple[0], as_tuple[2], strict=True)


@pytest.mark.parametrize("by_weight", [True, False], ids=["probs", "position"])
@pytest.mark.parametrize("shape", SHAPES)
def test_routes(backend, shape, by_weight):
    T, K, E, _ = SHAPES[shape]
    ids, weights = choices(T, K, E)
    dtypes = [torch.float32] if shape not in ("plain", "H odd") else [torch.float32, torch.bfloat16, torch.float64]
    for dtype in dtypes:
        for capacity in (-1, 0, 1, 5, 40, 10**6):
            index = ids if capacity == 5 else ids.int()
            for found, expected in both(backend, "build_routes", index, weights.to(dtype), E, capacity, by_weight):
                assert_same(found, expected)


def test_routes_of_random_weights_and_of_one_crowded_expert(backend):
    ids, _ = choices(30000, 4, 16, seed=3, missing=0)
    weights = torch.randn(30000, 4, generator=torch.Generator().manual_seed(1))
    for capacity in (1, 100, 5000, 7400):
        for found, expected in both(backend, "build_routes", ids, weights, 16, capacity, True):
            assert_same(found, expected)
    everything = torch.full((50000, 1), 5)
    for by_weight in (True, False):
        crowd = weights[:, :1].repeat(2, 1)[:50000]
        for found, expected in both(backend, "build_routes", everything, crowd, 9, 777, by_weight):
            assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, "K = E = 200"])
def test_choices_of_a_map_and_their_gradient(backend, shape, dtype):
    T, K, E, _ = SHAPES.get(shape, (70, 200, 200, 0))
    ids, _ = choices(T, K, E)
    routing_map = torch.zeros(T, E + 1, dtype=torch.bool)
    routing_map.scatter_(1, torch.where(ids < 0, E, ids), True)
    routing_map, generator = routing_map[:, :E].contiguous(), torch.Generator().manual_seed(T)
    probs = torch.randn(T, E, generator=generator).to(dtype)
    for topk in {K, max(1, K - 1), 1}:
        for found, expected in both(backend, "choices_of_map", routing_map, probs, topk):
            assert_same(found, expected)
        ids, weights = reference.choices_of_map(routing_map, probs, topk)
        for capacity in (-1, 3):
            inverse = reference.build_routes(ids, weights, E, capacity, True)[-1]
            grad = torch.randn(ids.numel(), generator=generator).to(dtype)
            ((found, expected),) = both(backend, "gradient_of_map", grad, inverse, ids, E)
            assert_same(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_merge_order(backend, shape):
    T, _, E, _ = SHAPES[shape]
    counts = torch.randint(0, 40, (E, 1) if E > 512 else (4, E), generator=torch.Generator().manual_seed(T))
    counts[counts < 20] = 0
    for found, expected in both(backend, "merge_order", counts, int(counts.sum())):
        assert_same(found, expected)


def layout(shape, dtype, index_dtype):
    """Rows, index arrays and weights of a permute of `shape`, on the CPU."""
    T, K, E, H = SHAPES[shape]
    ids, weights = choices(T, K, E)
    token_ids, _, counts, _, inverse = reference.build_routes(ids, weights, E, -1, False)
    token_ids = token_ids[: int(counts.sum()) + 3]  # with rows that nobody owns, where there are some
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(T, H, generator=generator).to(dtype)
    y = torch.randn(len(token_ids), H, generator=generator).to(dtype)
    acc = reference.accumulator(dtype)
    return x, y, token_ids.to(index_dtype), inverse.to(index_dtype), torch.randn(T, K, generator=generator).to(acc)


# every type at two shapes, and the types of training at all
ROWS = [(shape, dtype, torch.int32) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
ROWS += [(shape, dtype, torch.int32) for shape in ("plain", "H odd") for dtype in (torch.float16, torch.float64)]
ROWS += [(shape, torch.bfloat16, torch.int64) for shape in ("plain", "H odd", "wide")]


@pytest.mark.parametrize("shape, dtype, index_dtype", ROWS, ids=str)
def test_rows(backend, shape, dtype, index_dtype):
    x, y, token_ids, inverse, weights = layout(shape, dtype, index_dtype)
    tolerance = TOLERANCE.get(dtype, dtype)

    ((rows, expected),) = both(backend, "gather_rows", x, token_ids)
    assert_same(rows, expected)
    (rows, expected), (none, _) = both(backend, "spread_rows", x, inverse, token_ids, None, None)
    assert_same(rows, expected)
    assert none is None

    wide = [t.double() for t in (x, y, weights)]
    for scale, exact in ((weights, wide[2]), (None, None)):
        ((total, _),) = both(backend, "sum_rows", y, inverse, scale, None)
        assert_close(total, reference.sum_rows(wide[1], inverse, exact, None), tolerance)
        (rows, expected), (dots, _) = both(backend, "spread_rows", x, inverse, token_ids, scale, y)
        assert_same(rows, expected)
        assert_close(dots, reference.dot_rows(wide[1], inverse, wide[0]), reference.accumulator(dtype))
    ((dots, _),) = both(backend, "dot_rows", y, inverse, x)
    assert_close(dots, reference.dot_rows(wide[1], inverse, wide[0]), reference.accumulator(dtype))

    # lists of different lengths, some empty, and positions before the first and after the last
    flat, count = inverse.reshape(-1), inverse.numel()
    offsets = torch.tensor([0, 0, 1, 1, 9, 30]).clamp_max(count) + min(2, count)
    offsets = offsets.clamp_max(count)
    ((total, _),) = both(backend, "sum_rows", y, flat, weights.reshape(-1), offsets)
    assert_close(total, reference.sum_rows(wide[1], flat, wide[2].reshape(-1), offsets), tolerance)


def test_choices_that_name_no_row_at_all(backend):
    x, index = torch.randn(5, 64), torch.full((5, 3), -1, dtype=torch.int32)
    empty, none = torch.zeros(0, 64), torch.zeros(0, dtype=torch.int32)
    torch.full((1 << 20,), float("nan"), device="cuda")  # freed at once: memory that nothing wrote holds NaN
    (rows, _), (dots, expected) = both(backend, "spread_rows", x, index, none, torch.ones(5, 3), empty)
    assert rows.shape == (0, 64)
    assert_same(dots, expected)


def test_not_a_number_counts_as_the_largest_weight(backend):
    weights = torch.tensor([0xFFC00000, 0x3F800000, 0x7FC00001, 0x7F800000, 0x7FC00000], dtype=torch.int64)
    weights = weights.to(torch.int32).view(torch.float32).view(-1, 1)
    for capacity in (1, 2, 3, 4):
        found = backend("build_routes")(torch.zeros(5, 1, dtype=torch.int32).cuda(), weights.cuda(), 1, capacity, True)
        assert found[0][:capacity].tolist() == sorted([0, 2, 4, 3][:capacity])


def test_rows_that_are_not_aligned(backend):
    x = torch.randn(64 * 40 + 1, dtype=torch.float32).bfloat16()
    index = torch.randint(-1, 64, (30, 2), generator=torch.Generator().manual_seed(0))
    shifted, same = x.cuda()[1:].view(64, 40), x[1:].view(64, 40)
    first = index[:, 0].contiguous()
    assert_same(backend("gather_rows")(shifted, first.cuda()), reference.gather_rows(same, first))
    assert_same(backend("sum_rows")(shifted, index.cuda(), None, None), reference.sum_rows(same, index, None, None))


def test_more_than_two_to_the_31_elements(backend):
    """4.3e9 elements, 8.6 GB a matrix: the last rows are the interesting ones."""
    rows, H = 2**20 + 3, 4096
    x = torch.empty(rows, H, dtype=torch.bfloat16, device="cuda")
    x[:] = torch.arange(rows, device="cuda").remainder_(199).unsqueeze(1)
    x[:, 0] = 1
    index = torch.arange(rows - 1, -1, -1, device="cuda", dtype=torch.int32)
    moved = backend("gather_rows")(x, index)
    assert torch.equal(moved[:5], x[-5:].flip(0)) and torch.equal(moved[-5:], x[:5].flip(0))
    assert torch.equal(moved[2**19 : 2**19 + 4], x[rows - 1 - 2**19 - 3 : rows - 2**19].flip(0))
    del moved
    spread, _ = backend("spread_rows")(x, index.unsqueeze(1), index, None, None)
    assert torch.equal(spread[-5:], x[:5].flip(0))
    total = backend("sum_rows")(spread, index.unsqueeze(1), None, None)
    assert torch.equal(total, x)
