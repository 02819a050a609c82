"""What tools/benchmark_ops.py times: the project's backends, torch's index operations, other packages.

Letters: T tokens, K routes per token, E experts, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_xmoe._optional import probe
from megatron_xmoe.kernels import registry

COLUMNS = (
    "metadata",
    "permute",
    "metadata+permute",
    "unpermute",
    "permute backward",
    "unpermute backward",
    "gather",
    "choices of map",
    "gradient of map",
)
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}  # relative RMS error
Calls = dict[str, Callable[[], Any]]


class Inputs:
    """Data of one shape, the same on every run; `bytes` has the least bytes that columns must move."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        tokens, per_token, experts, hidden = self.shape = shape
        self.dtype = dtype
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        scores, ids = (normal(tokens, experts) + 0.5 * normal(experts)).topk(per_token, dim=1)
        self.ids = ids.to(torch.int32)
        self.weights = scores.softmax(dim=1)
        self.map = torch.zeros(tokens, experts, dtype=torch.bool, device=device).scatter_(1, ids, True)
        self.x, self.grad_out = (normal(tokens, hidden).to(dtype) for _ in range(2))
        self.y, self.grad_rows = (normal(tokens * per_token, hidden).to(dtype) for _ in range(2))
        self.probs = torch.zeros(tokens, experts, device=device).scatter_(1, ids, self.weights)
        build_routes = registry.implementation("reference", "build_routes")
        choices = registry.implementation("reference", "choices_of_map")(self.map, self.probs, per_token)
        self.of_map = build_routes(*choices, experts, -1, False)[-1], choices[0]  # inverse and experts, ascending
        self.token_ids, _, _, _, self.inverse = build_routes(self.ids, self.weights, experts, -1, False)
        row = hidden * dtype.itemsize
        moved = ("permute", "metadata+permute", "unpermute", "permute backward")
        self.bytes = dict.fromkeys(moved, tokens * row * (1 + per_token))
        self.bytes["unpermute backward"] = tokens * row * (1 + 2 * per_token)
        self.bytes["gather"] = tokens * row * 2 * per_token


@dataclass(frozen=True)
class System:
    """Something to time."""

    name: str
    calls: Calls
    """One callable per column that it has."""

    check: Callable[[], str]
    """Says what is wrong with the results; empty if nothing is."""


def backend_calls(name: str, data: Inputs) -> Calls:
    """One of the project's backends, by column."""
    per_token, experts = data.shape[1:3]
    operations = "build_routes choices_of_map gradient_of_map gather_rows spread_rows sum_rows".split()
    build_routes, choices_of_map, gradient_of_map, gather_rows, spread_rows, sum_rows = (
        registry.implementation(name, operation) for operation in operations
    )

    def both():
        token_ids, _, _, _, inverse = build_routes(data.ids, data.weights, experts, -1, False)
        return spread_rows(data.x, inverse, token_ids, None, None)

    inverse, owners = data.inverse, data.token_ids
    return {
        "metadata": lambda: build_routes(data.ids, data.weights, experts, -1, False),
        "permute": lambda: spread_rows(data.x, inverse, owners, None, None),
        "metadata+permute": both,
        "unpermute": lambda: sum_rows(data.y, inverse, data.weights, None),
        "permute backward": lambda: sum_rows(data.grad_rows, inverse, None, None),
        "unpermute backward": lambda: spread_rows(data.grad_out, inverse, owners, data.weights, data.y),
        "gather": lambda: gather_rows(data.x, owners),
        "choices of map": lambda: choices_of_map(data.map, data.probs, per_token),
        "gradient of map": lambda: gradient_of_map(data.weights.view(-1), *data.of_map, experts),
    }


def backend(name: str, data: Inputs) -> System:
    """One of the project's backends; its results are compared with the reference's."""
    calls = backend_calls(name, data)

    def check() -> str:
        for column, expected in backend_calls("reference", data).items():
            if problem := difference(calls[column](), expected(), data.dtype):
                return f"{column}: {problem}"
        return ""

    return System(name, calls, check)


def torch_index_ops(data: Inputs) -> System:
    """What one writes in plain torch: argsort, index_select, index_add_."""
    tokens, per_token, experts, hidden = data.shape
    token_ids, positions = data.token_ids.long(), data.inverse.reshape(-1).long()
    row_weights = torch.empty_like(data.weights.reshape(-1)).scatter_(0, positions, data.weights.reshape(-1))
    row_weights = row_weights[:, None].to(data.dtype)

    def metadata():
        order = torch.argsort(data.ids.reshape(-1), stable=True)
        return order // per_token, torch.bincount(data.ids.reshape(-1), minlength=experts)

    def add(rows: Tensor) -> Tensor:
        return rows.new_zeros(tokens, hidden).index_add_(0, token_ids, rows)

    def unpermute_backward():
        rows = data.grad_out.index_select(0, token_ids)
        return rows * row_weights, (rows * data.y).sum(dim=1)

    calls = {
        "metadata": metadata,
        "permute": lambda: data.x.index_select(0, token_ids),
        "metadata+permute": lambda: data.x.index_select(0, metadata()[0]),
        "unpermute": lambda: add(data.y * row_weights),
        "permute backward": lambda: add(data.grad_rows),
        "unpermute backward": unpermute_backward,
        "gather": lambda: data.x.index_select(0, token_ids),
    }
    # sums in the rows' own type are less exact than ours, so only the movement is compared
    return System("torch index ops", calls, lambda: difference(calls["permute"](), data.x[token_ids], data.dtype))


def moe_ops(data: Inputs) -> System:
    """The package moe_ops (Triton); its permute sorts as well, in an order that varies from run to run."""
    import moe_ops as package

    tokens, per_token, experts, _ = data.shape
    _, row_map, _ = package.permute(data.x, data.ids, E=experts)
    calls = {
        "metadata+permute": lambda: package.permute(data.x, data.ids, E=experts),
        "unpermute": lambda: package.unpermute_forward(data.y, row_map, data.weights, tokens, per_token),
        "permute backward": lambda: package.permute_backward(data.grad_rows, row_map, tokens, per_token),
        "unpermute backward": lambda: package.unpermute_backward(
            data.grad_out, data.y, row_map, data.weights, tokens, per_token
        ),
    }

    def check() -> str:
        rows, row_map, _ = package.permute(data.x, data.ids, E=experts)
        return round_trip(package.unpermute_forward(rows, row_map, data.weights, tokens, per_token), data)

    return System("moe_ops", calls, check)


def liger(data: Inputs) -> System:
    """Liger's fused MoE has two of these steps as functions of their own; its metadata waits for the GPU."""
    from liger_kernel.ops import fused_moe

    tokens, per_token, experts, hidden = data.shape
    positions = fused_moe.compute_routing_metadata(data.ids, experts)[4]
    weights = data.weights.reshape(-1)

    def unpermute(rows: Tensor) -> Tensor:
        return fused_moe._token_aggregation(rows, weights, positions, tokens, per_token, hidden)

    calls = {
        "metadata": lambda: fused_moe.compute_routing_metadata(data.ids, experts),
        "unpermute": lambda: unpermute(data.y),
    }

    def check() -> str:
        rows = torch.empty_like(data.y)
        rows[positions.long()] = data.x.repeat_interleave(per_token, dim=0)
        return round_trip(unpermute(rows), data)

    return System("Liger", calls, check)


def transformer_engine(data: Inputs) -> System:
    """Transformer Engine's permutation from a boolean map, as Megatron calls it."""
    from transformer_engine.pytorch import permutation

    tokens, per_token, _, hidden = data.shape
    probs = torch.zeros_like(data.map, dtype=torch.float32).scatter_(1, data.ids.long(), data.weights)
    permute = partial(
        permutation.moe_permute, data.x, data.map, num_out_tokens=tokens * per_token, map_type="mask"
    )
    _, row_map = permute()

    def unpermute(rows: Tensor) -> Tensor:
        return permutation.moe_unpermute(
            rows, row_map, merging_probs=probs, restore_shape=torch.Size((tokens, hidden)), map_type="mask"
        )

    calls = {"metadata+permute": permute, "unpermute": lambda: unpermute(data.y)}
    return System("Transformer Engine", calls, lambda: round_trip(unpermute(permute()[0]), data))


PEERS = {
    "moe_ops": ("moe_ops", moe_ops),
    "Liger": ("liger_kernel", liger),
    "Transformer Engine": ("transformer_engine.pytorch", transformer_engine),
}


def systems(data: Inputs, device: torch.device) -> tuple[list[System], list[str]]:
    """All that can be timed here, and a line for each that cannot, with the reason."""
    found, left_out = [], []
    for candidate in registry.candidates(device.type):
        if candidate.usable:
            found.append(backend(candidate.name, data))
        else:
            left_out.append(f"{candidate.name}: {candidate.reason}")
    found.append(torch_index_ops(data))
    for name, (module, make) in PEERS.items():
        available = probe(module)
        if not available.usable:
            left_out.append(f"{name}: {available.reason}")
        elif device.type != "cuda":
            left_out.append(f"{name}: needs a GPU")
        else:
            try:
                system = make(data)
                for call in (*system.calls.values(), system.check):
                    call()
                found.append(system)
            except Exception as error:  # another version of the package, or a shape that it does not take
                left_out.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return found, left_out


def round_trip(found: Tensor, data: Inputs) -> str:
    """Compares unpermute(permute(x)) with x, whose weights add up to 1."""
    return difference(found, data.x, data.dtype)


def difference(found: Any, expected: Any, dtype: torch.dtype) -> str:
    """What differs between results (tensors, or tuples of tensors and None) beyond the tolerance; empty if nothing."""
    found, expected = ([r] if torch.is_tensor(r) else [t for t in r if t is not None] for r in (found, expected))
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {number} is {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}"
        if a.dtype.is_floating_point:
            norm = b.float().norm().item()
            error = (a.float() - b.float()).norm().item() / (norm or 1.0)
            if not error <= TOLERANCE[dtype]:  # NaN compares false
                return f"result {number} has a relative RMS error of {error:.2g}"
        elif not torch.equal(a, b):
            return f"{(a != b).sum().item()} of {a.numel()} elements of result {number} differ"
    return ""
