"""Routes and row movement against the loop oracle: every result and every gradient, with the awkward shapes."""

import functools

import oracles
import pytest
import torch
from map_cases import random_map
from tolerances import assert_close, assert_same

from megatron_xmoe.kernels.registry import candidates, kernel
from megatron_xmoe.ops import build_routes, build_routes_from_map, gather_rows, gather_sum

# name -> (choices [T][K], number of experts); -1 is a choice not made
CHOICES = {
    "plain": ([[3, 1, 0], [2, 3, 4], [0, 4, 1], [1, 0, 2], [4, 2, 3], [3, 0, 1], [1, 2, 4]], 5),
    "zero tokens": ([], 3),
    "one expert": ([[0], [0], [0], [0]], 1),
    "K = E": ([[2, 0, 1], [0, 1, 2], [1, 2, 0], [2, 1, 0]], 3),
    "all to one expert": ([[2], [2], [2], [2], [2], [2]], 4),
    "missing": ([[1, -1, 3], [-1, -1, -1], [-1, 0, -1], [3, 2, 1], [-1, -1, 0]], 4),
    "none at all": ([[-1, -1], [-1, -1]], 2),
    "an expert twice": ([[1, 1], [0, 1], [1, 0], [0, 0]], 2),
}
MAPS = {
    "plain": ([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0]], 2),
    "zero tokens": ([], 2),
    "one expert": ([[1], [1], [1]], 1),
    "K = E": ([[1, 1, 1], [1, 1, 1]], 3),
    "all to one expert": ([[0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]], 1),
    "fewer than K": ([[0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1]], 3),
    "none at all": ([[0, 0], [0, 0]], 2),
}


def choices(name: str, dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, int]:
    """The named choices [T, K] and their number of experts."""
    rows, num_experts = CHOICES[name]
    per_token = len(rows[0]) if rows else 2
    return torch.tensor(rows, dtype=dtype).view(-1, per_token), num_experts


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values, the same on every call."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True, params=[found.name for found in candidates("cpu") if found.usable])
def backend(request, monkeypatch):
    """Every test runs with each backend that this machine has for CPU tensors."""
    monkeypatch.setenv("XMOE_KERNELS", request.param)


@pytest.fixture
def unstable_sort(monkeypatch):
    """A sort that puts ties in reverse order unless it is asked to be stable, as one on a GPU may."""

    def reversing(original):
        @functools.wraps(original)
        def sort(x, dim=-1, descending=False, stable=False):
            if stable:
                return original(x, dim=dim, descending=descending, stable=True)
            result = original(x.flip(dim), dim=dim, descending=descending, stable=True)
            last = x.shape[dim] - 1
            return last - result if torch.is_tensor(result) else (result[0], last - result[1])

        return sort

    for name in ("sort", "argsort"):
        monkeypatch.setattr(torch, name, reversing(getattr(torch, name)))


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.zeros(3).new_empty(2).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) > 2**60).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", CHOICES)
def test_routes_are_ordered_by_expert_then_token(name, dtype, unstable_sort):
    ids, num_experts = choices(name, dtype)
    expected = oracles.routes(ids.tolist(), num_experts)
    routes = build_routes(ids, random(*ids.shape), num_experts)

    count = len(expected.token_ids)
    assert routes.tokens_per_expert.tolist() == expected.tokens_per_expert
    assert routes.token_ids[:count].tolist() == expected.token_ids
    assert routes.expert_ids[:count].tolist() == expected.expert_ids
    assert routes.inverse.tolist() == expected.inverse
    assert routes.inverse.shape == ids.shape
    for array in (routes.token_ids, routes.expert_ids, routes.combine_weights):
        assert array.shape == (ids.numel(),)
        assert (array[count:] == (0 if array.is_floating_point() else -1)).all()
    for array in (routes.token_ids, routes.expert_ids, routes.inverse):
        assert array.dtype == torch.int32
    assert routes.tokens_per_expert.dtype == torch.int64


@pytest.mark.parametrize("name", CHOICES)
def test_combine_weights_and_their_gradient(name):
    ids, num_experts = choices(name)
    expected = oracles.routes(ids.tolist(), num_experts)
    count = len(expected.token_ids)
    weights = random(*ids.shape).requires_grad_()
    combine_weights = build_routes(ids, weights, num_experts).combine_weights[:count]
    assert_same(combine_weights, weights[expected.token_ids, expected.slots])

    grad = random(count, seed=1)
    (found,) = torch.autograd.grad(combine_weights, weights, grad)
    by_hand = torch.zeros_like(weights)
    for position, place in enumerate(zip(expected.token_ids, expected.slots, strict=True)):
        by_hand[place] = grad[position]
    assert_same(found, by_hand)


@pytest.mark.parametrize("by_weight", [True, False], ids=["probs", "position"])
@pytest.mark.parametrize("capacity", [0, 1, 2, 100])
@pytest.mark.parametrize("name", CHOICES)
def test_capacity_keeps_the_heaviest_or_the_earliest(name, capacity, by_weight):
    ids, num_experts = choices(name)
    weights = torch.randint(-2, 3, ids.shape, generator=torch.Generator().manual_seed(3)) / 2  # with ties
    kept = ids.tolist()
    for expert in range(num_experts):
        places = [(t, k) for t, row in enumerate(ids.tolist()) for k, choice in enumerate(row) if choice == expert]
        if by_weight:
            places.sort(key=lambda place: -weights[place].item())  # stable: the earliest first among equals
        for t, k in places[capacity:]:
            kept[t][k] = -1
    expected = oracles.routes(kept, num_experts)
    count = len(expected.token_ids)
    leaf = weights.clone().requires_grad_()
    routes = build_routes(ids, leaf, num_experts, capacity, "probs" if by_weight else "position")
    assert routes.tokens_per_expert.tolist() == expected.tokens_per_expert
    assert routes.token_ids.tolist() == expected.token_ids + [-1] * (ids.numel() - count)
    assert routes.expert_ids[:count].tolist() == expected.expert_ids
    assert routes.inverse.tolist() == expected.inverse
    grad = random(ids.numel(), seed=1)
    (found,) = torch.autograd.grad(routes.combine_weights, leaf, grad)
    by_hand = torch.zeros_like(weights)
    for position, place in enumerate(zip(expected.token_ids, expected.slots, strict=True)):
        by_hand[place] = grad[position]
    assert_same(found, by_hand)


@pytest.mark.parametrize("name", MAPS)
def test_routes_from_a_map(name, unstable_sort):
    rows, topk = MAPS[name]
    routing_map = torch.tensor(rows, dtype=torch.bool).view(-1, len(rows[0]) if rows else 3)
    probs = random(*routing_map.shape).requires_grad_()
    expected = oracles.routes(oracles.choices_of_map(routing_map, topk), routing_map.shape[1])
    count = len(expected.token_ids)

    routes = build_routes_from_map(routing_map, probs, topk)
    assert routes.token_ids[:count].tolist() == expected.token_ids
    assert routes.expert_ids[:count].tolist() == expected.expert_ids
    assert routes.tokens_per_expert.tolist() == expected.tokens_per_expert
    assert routes.inverse.tolist() == expected.inverse

    combine_weights = routes.combine_weights[:count]
    assert_same(combine_weights, probs[expected.token_ids, expected.expert_ids])
    grad = random(count, seed=1)
    (found,) = torch.autograd.grad(combine_weights, probs, grad)
    by_hand = torch.zeros_like(probs)
    by_hand[expected.token_ids, expected.expert_ids] = grad
    assert_same(found, by_hand)


def test_choices_that_were_not_made_have_no_weight():
    routing_map, expected = random_map(20, 6, 3)
    probs = random(20, 6).masked_fill_(~routing_map, torch.nan)
    ids, weights = kernel("choices_of_map", "cpu")(routing_map, probs, 3)
    assert_same(ids, expected)
    assert_same(weights, torch.where(ids < 0, 0, probs.gather(1, ids.clamp_min(0).long())))


def chosen_by_torch(
    routing_map: torch.Tensor, probs: torch.Tensor, topk: int, capacity: int | None, policy: str
) -> torch.Tensor:
    """combine_weights [T*K] by operations that torch differentiates: a gather at the routes that loops keep."""
    tokens, num_experts = routing_map.shape
    kept = []
    for expert in range(num_experts):
        found = [t for t, row in enumerate(oracles.choices_of_map(routing_map, topk)) if expert in row[:topk]]
        if capacity is not None:
            best = sorted(found, key=lambda t: -probs[t, expert].item()) if policy == "probs" else found
            found = sorted(best[:capacity])
        kept += [t * num_experts + expert for t in found]
    weights = probs.reshape(-1).gather(0, torch.tensor(kept, dtype=torch.int64))
    return torch.cat([weights, weights.new_zeros(tokens * topk - len(kept))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "dropping", [(None, "probs"), (0, "probs"), (3, "probs"), (3, "position"), (10**6, "position")], ids=str
)
@pytest.mark.parametrize("shape", [(20, 6, 2), (0, 4, 3), (7, 1, 1), (12, 5, 5), (30, 40, 7)], ids=str)
def test_weights_from_a_map_and_the_gradient_of_probs(shape, dropping, dtype):
    """Against autograd through a gather, bit for bit, with tokens that chose fewer and more than K experts or none."""
    routing_map, _ = random_map(*shape)
    probs = random(*routing_map.shape, dtype=dtype).requires_grad_()
    expected = chosen_by_torch(routing_map, probs, shape[2], *dropping)
    grad = random(*expected.shape, dtype=dtype, seed=1)
    (expected_grad,) = torch.autograd.grad(expected, probs, grad)
    routes = build_routes_from_map(routing_map, probs, shape[2], *dropping)
    assert_same(routes.combine_weights, expected)
    (found,) = torch.autograd.grad(routes.combine_weights, probs, grad)
    assert_same(found, expected_grad)
    assert (found[~routing_map] == 0).all()


def test_a_map_in_any_form():
    """Numbers for a map, and a map, probs and a gradient that are not contiguous."""
    routing_map, _ = random_map(12, 6, 3)
    probs, wide_grad = random(12, 6), random(36, 2, seed=1)
    leaf = probs.clone().requires_grad_()
    expected = build_routes_from_map(routing_map, leaf, 3, 2)
    (expected_grad,) = torch.autograd.grad(expected.combine_weights, leaf, wide_grad[:, 1].contiguous())
    maps = [routing_map.to(dtype) for dtype in (torch.int64, torch.uint8, torch.float32)]
    for given in (*maps, -maps[0], routing_map.t().contiguous().t(), routing_map.repeat(1, 2)[:, :6]):
        spread = probs.t().contiguous().t().requires_grad_()
        assert not spread.is_contiguous()
        found = build_routes_from_map(given, spread, 3, 2)
        for name in ("token_ids", "expert_ids", "tokens_per_expert", "combine_weights", "inverse"):
            assert_same(getattr(found, name), getattr(expected, name))
        (grad,) = torch.autograd.grad(found.combine_weights, spread, wide_grad[:, 1])
        assert_same(grad, expected_grad)


@pytest.mark.parametrize("dropping", [(None, "probs"), (3, "probs"), (3, "position")], ids=str)
def test_gradcheck_routes_from_a_map(dropping):
    routing_map, _ = random_map(9, 5, 3)
    probs = random(9, 5, dtype=torch.float64).requires_grad_()

    def weights(probs):
        return build_routes_from_map(routing_map, probs, 3, *dropping).combine_weights

    assert torch.autograd.gradcheck(weights, [probs])


def test_routes_take_memory_in_proportion_to_their_number():
    tokens, num_experts = 2**17, 2**20  # an array of tokens x experts would take 128 GiB
    ids = torch.tensor([[5, num_experts - 1]]).expand(tokens, 2)
    routes = build_routes(ids, torch.ones(tokens, 2), num_experts)
    assert routes.tokens_per_expert[[5, num_experts - 1]].tolist() == [tokens, tokens]
    assert torch.equal(routes.token_ids, torch.arange(tokens, dtype=torch.int32).repeat(2))


# name -> (index into 5 rows, of which -1 names none)
INDEXES = {
    "permutation": [4, 2, 0, 1, 3],
    "some": [3, 1],
    "repeats": [2, 2, 0, 4, 2, 0],
    "missing": [-1, 3, -1, 1, 1, -1],
    "all missing": [-1, -1],
    "empty": [],
}


def positions(index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[R, K'] where each row of the source went to, filled up with -1."""
    places = [[m for m, i in enumerate(index.tolist()) if i == r] for r in range(num_rows)]
    width = max(map(len, places), default=0)
    return torch.tensor([p + [-1] * (width - len(p)) for p in places], dtype=index.dtype).view(num_rows, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("with_inverse", [False, True], ids=["no inverse", "inverse"])
@pytest.mark.parametrize("name", INDEXES)
def test_gather_rows(name, with_inverse, index_dtype, dtype):
    index = torch.tensor(INDEXES[name], dtype=index_dtype)
    x = random(5, 7, dtype=dtype).requires_grad_()
    inverse = positions(index, 5) if with_inverse else None
    result = gather_rows(x, index, inverse)
    assert_same(result, oracles.gather(x.detach(), index))

    grad = random(len(index), 7, dtype=dtype, seed=1)
    (found,) = torch.autograd.grad(result, x, grad)
    assert found.dtype == dtype
    _, (expected,) = oracles.gradients(lambda x: oracles.gather(x, index), [x], grad)
    assert_close(found, expected)


@pytest.mark.parametrize("with_inverse", [False, True], ids=["no inverse", "inverse"])
def test_gather_from_no_rows_gives_zeros(with_inverse):
    index = torch.tensor([-1, -1, -1])
    x = torch.zeros(0, 5, requires_grad=True)
    result = gather_rows(x, index, torch.zeros(0, 2, dtype=torch.int64) if with_inverse else None)
    assert_same(result, torch.zeros(3, 5))
    (found,) = torch.autograd.grad(result, x, torch.ones(3, 5))
    assert found.shape == (0, 5)


# name -> (index [T][K] into 6 rows, whether no row is named twice)
SUMS = {
    "unpermute": ([[4, 0, 2], [5, 1, 3]], True),
    "missing": ([[4, -1, 2], [-1, -1, -1], [-1, 0, -1], [-1, -1, 5]], True),
    "one per sum": ([[3], [1], [0]], True),
    "repeats": ([[2, 2, 0], [0, -1, 2], [5, 4, 5]], False),
    "all from one row": ([[1, 1], [1, 1], [1, 1]], False),
    "nothing": ([[-1, -1], [-1, -1]], True),
    "zero tokens": ([], True),
    "K = 0": ([[], []], True),
}
SUM_VARIANTS = [
    pytest.param(name, weighted, owned, id=f"{name}-{'weights' if weighted else 'ones'}-{'owned' if owned else 'any'}")
    for name in SUMS
    for weighted in (False, True)
    for owned in ((False, True) if SUMS[name][1] else (False,))
]


def sum_index(name: str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """The named index [T, K]."""
    rows = SUMS[name][0]
    return torch.tensor(rows, dtype=dtype).view(len(rows), len(rows[0]) if rows else 2)


def owners(index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[R] the sum that each row is part of, -1 for none."""
    result = torch.full((num_rows,), -1, dtype=index.dtype)
    for t, row in enumerate(index.tolist()):
        for i in row:
            if i >= 0:
                result[i] = t
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("name", "weighted", "owned"), SUM_VARIANTS)
def test_gather_sum(name, weighted, owned, index_dtype, dtype):
    index = sum_index(name, index_dtype)
    inputs = [random(6, 20, dtype=dtype).requires_grad_()]
    if weighted:
        inputs.append(random(*index.shape, dtype=dtype, seed=2).requires_grad_())
    result = gather_sum(inputs[0], index, *inputs[1:], token_ids=owners(index, 6) if owned else None)
    assert result.dtype == dtype
    grad = random(*result.shape, dtype=dtype, seed=1)
    expected, expected_grads = oracles.gradients(lambda y, *w: oracles.gather_sum(y, index, *w), inputs, grad)
    assert_close(result, expected)
    for found, wanted, leaf in zip(torch.autograd.grad(result, inputs, grad), expected_grads, inputs, strict=True):
        assert found.dtype == leaf.dtype
        assert_close(found, wanted)


def test_sum_of_no_rows_gives_zeros():
    result = gather_sum(torch.zeros(0, 5, requires_grad=True), torch.tensor([[-1, -1]]), torch.ones(1, 2))
    assert_same(result, torch.zeros(1, 5))
    result.sum().backward()


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sum_is_in_fp32_and_in_ascending_order(dtype, weights_dtype):
    index = torch.tensor([[3, 0, 5, 1], [2, 4, 1, 0]])
    y, weights = random(6, 33, dtype=dtype), random(2, 4, dtype=weights_dtype)
    expected = oracles.gather_sum(y.float(), index, weights.float())
    assert_same(gather_sum(y, index, weights), expected.to(dtype))


# 256 + 1 is 256 in bf16: only a sum in a wider type arrives at 264
SMALL_AND_LARGE = torch.tensor([[256.0]] + [[1.0]] * 8, dtype=torch.bfloat16).expand(9, 3)


def test_bf16_rows_are_summed_in_fp32():
    y = SMALL_AND_LARGE.contiguous()
    assert gather_sum(y, torch.arange(9).unsqueeze(0)).tolist() == [[264.0] * 3]
    assert gather_sum(y, torch.arange(9).unsqueeze(0), torch.ones(1, 9)).tolist() == [[264.0] * 3]


@pytest.mark.parametrize("with_inverse", [False, True], ids=["no inverse", "inverse"])
def test_bf16_gradients_of_repeated_rows_are_summed_in_fp32(with_inverse):
    x = torch.zeros(1, 3, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(9, dtype=torch.int64)
    result = gather_rows(x, index, positions(index, 1) if with_inverse else None)
    (grad,) = torch.autograd.grad(result, x, SMALL_AND_LARGE)
    assert grad.tolist() == [[264.0] * 3]


def test_bf16_gradient_of_a_row_in_many_sums_is_summed_in_fp32():
    y = torch.zeros(1, 3, dtype=torch.bfloat16, requires_grad=True)
    result = gather_sum(y, torch.zeros(9, 1, dtype=torch.int64))
    (grad,) = torch.autograd.grad(result, y, SMALL_AND_LARGE)
    assert grad.tolist() == [[264.0] * 3]


def test_bf16_weight_gradient_is_a_dot_product_in_fp32():
    y = torch.full((1, 9), 1.0, dtype=torch.bfloat16)
    weights = torch.ones(1, 1, requires_grad=True)
    result = gather_sum(y, torch.zeros(1, 1, dtype=torch.int64), weights)
    grad = torch.tensor([[256.0] + [1.0] * 8], dtype=torch.bfloat16) * 1.0078125  # so that products round, too
    (found,) = torch.autograd.grad(result, weights, grad)
    assert found.dtype == torch.float32
    assert found.item() == grad.float().sum().item()


def test_permute_and_unpermute_with_the_arrays_of_routes():
    """What a dispatcher does, with fewer than K experts for some tokens: both ways, with and without the hints."""
    ids, num_experts = choices("missing")
    routes = build_routes(ids, random(*ids.shape), num_experts)
    count = int(routes.tokens_per_expert.sum())
    token_ids = routes.token_ids[:count]
    grad = random(len(ids), 7, dtype=torch.float64, seed=1)

    def permuted(x, w, inverse, owner):
        rows = gather_rows(x, token_ids, inverse)
        return gather_sum(rows * rows, routes.inverse, w, token_ids=owner)

    def by_loops(x, w):
        rows = oracles.gather(x, token_ids)
        return oracles.gather_sum(rows * rows, routes.inverse, w)

    inputs = [random(len(ids), 7, dtype=torch.float64), random(*ids.shape, dtype=torch.float64)]
    expected, expected_grads = oracles.gradients(by_loops, inputs, grad)
    for inverse in (None, routes.inverse):
        for owner in (None, token_ids):
            leaves = [x.clone().requires_grad_() for x in inputs]
            result = permuted(*leaves, inverse, owner)
            assert_close(result, expected)
            for found, wanted in zip(torch.autograd.grad(result, leaves, grad), expected_grads, strict=True):
                assert_close(found, wanted)


@pytest.mark.parametrize("with_inverse", [False, True], ids=["no inverse", "inverse"])
def test_gradcheck_gather_rows(with_inverse):
    index = torch.tensor(INDEXES["missing"])
    inverse = positions(index, 5) if with_inverse else None
    x = random(5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, index, inverse), [x])


@pytest.mark.parametrize("owned", [False, True], ids=["any", "owned"])
def test_gradcheck_gather_sum(owned):
    index = sum_index("missing")
    token_ids = owners(index, 6) if owned else None
    y = random(6, 3, dtype=torch.float64).requires_grad_()
    weights = random(*index.shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w: gather_sum(y, index, w, token_ids), [y, weights])


def test_rows_that_are_not_contiguous():
    x = random(7, 5).t()
    index = sum_index("unpermute").clamp_max(4)
    assert_same(gather_rows(x, index[0]), oracles.gather(x, index[0]))
    assert_close(gather_sum(x, index), oracles.gather_sum(x, index))
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(gather_rows(leaf, index[0]).sum(), leaf)  # its gradient is one expanded number
    assert found.sum() == 3 * 7


BAD_CALLS = {
    "rows are a vector": (lambda: gather_rows(torch.ones(4), torch.zeros(2, dtype=torch.int64)), "(4,)"),
    "index is a matrix": (
        lambda: gather_rows(torch.ones(4, 3), torch.zeros(2, 5, dtype=torch.int64)),
        "(2, 5)",
    ),
    "index is a float": (lambda: gather_rows(torch.ones(4, 3), torch.zeros(2)), "torch.float32"),
    "index is a vector": (lambda: gather_sum(torch.ones(4, 3), torch.zeros(6, dtype=torch.int64)), "(6,)"),
    "summed rows are a vector": (
        lambda: gather_sum(torch.ones(4), torch.zeros(2, 2, dtype=torch.int64)),
        "(4,)",
    ),
    "inverse of other rows": (
        lambda: gather_rows(torch.ones(4, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(5, 1, dtype=torch.int64)),
        "(5, 1)",
    ),
    "weights of other sums": (
        lambda: gather_sum(torch.ones(4, 3), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 3)),
        "(2, 3)",
    ),
    "owners of other rows": (
        lambda: gather_sum(
            torch.ones(4, 3),
            torch.zeros(2, 2, dtype=torch.int64),
            token_ids=torch.zeros(3, dtype=torch.int64),
        ),
        "(3,)",
    ),
    "choices and weights differ": (
        lambda: build_routes(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4), 5),
        "(2, 4)",
    ),
    "choices are a vector": (
        lambda: build_routes(torch.zeros(3, dtype=torch.int64), torch.ones(3), 5),
        "(3,)",
    ),
    "no expert": (lambda: build_routes(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 0), "is 0"),
    "map and probs differ": (
        lambda: build_routes_from_map(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4), 1),
        "(2, 4)",
    ),
    "topk of 0": (
        lambda: build_routes_from_map(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3), 0),
        "is 0",
    ),
    "integer weights": (
        lambda: build_routes(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int32), 5),
        "torch.int32",
    ),
    "integer probs": (
        lambda: build_routes_from_map(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.int32), 1),
        "torch.int32",
    ),
    "negative capacity": (
        lambda: build_routes_from_map(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3), 1, -2),
        "is -2",
    ),
    "unknown policy": (
        lambda: build_routes_from_map(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3), 1, 2, "best"),
        "'best'",
    ),
    "topk above E": (
        lambda: build_routes_from_map(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3), 4),
        "is 4",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_shapes_are_refused_with_the_value(name):
    call, value = BAD_CALLS[name]
    with pytest.raises(ValueError) as raised:
        call()
    assert value in str(raised.value)
