"""What tools/benchmark_experts.py times: the experts' MLP by this project, by plain torch, by Megatron and by others.

Letters: T tokens, K experts per token, E experts, d hidden size, n FFN size of an expert; SwiGLU, without biases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xmoe._optional import probe
from megatron_xmoe.kernels.grouped_gemm import grouped_gemm_candidates
from megatron_xmoe.ops import RowsSource, build_routes, gather_sum
from megatron_xmoe.ops.activation import Activation
from megatron_xmoe.ops.grouped_gemm import Groups, backend
from megatron_xmoe.ops.grouped_mlp import ExpertWeights, grouped_mlp

Shape = tuple[int, int, int, int, int]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}  # relative RMS error of whole MLPs


class Inputs:
    """Data of one shape (T, d, n, E, K), the same on every run; routing is unbalanced."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        tokens, hidden, ffn, experts, per_token = self.shape = shape
        self.dtype, self.device = dtype, device
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device)
        scores, ids = (normal(tokens, experts) + 0.5 * normal(experts)).topk(per_token, dim=1)
        self.ids = ids.to(torch.int32)
        self.x = normal(tokens, hidden).to(dtype).requires_grad_()
        self.probs = scores.softmax(dim=1).requires_grad_()
        self.fc1 = (normal(experts, 2 * ffn, hidden) * hidden**-0.5).to(dtype).requires_grad_()
        self.fc2 = (normal(experts, hidden, ffn) * ffn**-0.5).to(dtype).requires_grad_()
        self.grad = normal(tokens, hidden).to(dtype)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Everything that gets a gradient."""
        return self.x, self.probs, self.fc1, self.fc2

    @property
    def flop(self) -> float:
        """Of the forward pass; forward and backward are three times as many."""
        tokens, hidden, ffn, _, per_token = self.shape
        return 6 * tokens * per_token * hidden * ffn


@dataclass(frozen=True)
class System:
    """Something to time."""

    name: str
    forward: Callable[[], Tensor]
    """From the unpermuted tokens to the combined output [T, d]."""

    backward: Callable[[Tensor], object] | None = None
    """Given the output, computes all gradients; None: by autograd, for Inputs.leaves."""

    leaves: tuple[Tensor, ...] = ()
    """What it has gradients for, where these are its own copies of the weights; tokens first."""

    agrees: bool = True
    """Whether it computes the same, and can be compared."""


def xmoe(name: str, data: Inputs, recompute: bool = False) -> System:
    """This project's MLP with one backend of the products, from routing metadata to the sum over experts."""
    gemm, experts = backend(name), data.shape[3]
    weights, activation = ExpertWeights(data.fc1, data.fc2), Activation(F.silu, True)

    def forward() -> Tensor:
        routes = build_routes(data.ids, data.probs, experts)
        counts = routes.tokens_per_expert
        groups = Groups.of(counts.cpu() if gemm.needs_sizes else counts, data.device)
        source = RowsSource(data.x, routes.token_ids, routes.inverse)
        rows = grouped_mlp(source, routes.combine_weights, weights, groups, activation, gemm, recompute)
        return gather_sum(rows, routes.inverse, token_ids=routes.token_ids)

    return System(f"X-MoE, {name}{', recomputed' if recompute else ''}", forward)


def loop(data: Inputs) -> System:
    """What one writes first: per expert its tokens, two linear layers, index_add_."""

    def forward() -> Tensor:
        output = torch.zeros_like(data.x)
        for expert in range(data.shape[3]):
            tokens, slots = torch.where(data.ids == expert)
            gate, up = F.linear(data.x[tokens], data.fc1[expert]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, data.fc2[expert]) * data.probs[tokens, slots].unsqueeze(1)
            output = output.index_add(0, tokens, rows.to(data.dtype))
        return output

    return System("loop over experts", forward)


def unfused(data: Inputs) -> System:
    """torch's grouped_mm between index operations."""
    tokens, hidden, _, experts, per_token = data.shape

    def forward() -> Tensor:
        order = torch.argsort(data.ids.reshape(-1), stable=True)
        ends = torch.bincount(data.ids.reshape(-1), minlength=experts).cumsum(0).to(torch.int32)
        rows = data.x[order // per_token]
        gate, up = F.grouped_mm(rows, data.fc1.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, data.fc2.transpose(1, 2), offs=ends)
        in_order = torch.empty_like(rows).index_copy(0, order, rows).view(tokens, per_token, hidden)
        return (in_order * data.probs.unsqueeze(2)).sum(dim=1).to(data.dtype)

    return System("grouped_mm, index ops", forward)


def dense(data: Inputs) -> System:
    """The same number of operations in matrix products of all rows with one expert: what the hardware can do."""
    tokens, hidden, ffn, _, per_token = data.shape
    rows, grad = (torch.randn(tokens * per_token, hidden, device=data.device).to(data.dtype) for _ in range(2))
    activated, wide = (torch.randn(len(rows), size, device=data.device).to(data.dtype) for size in (ffn, 2 * ffn))
    fc1, fc2 = data.fc1[0].detach(), data.fc2[0].detach()

    def forward() -> Tensor:
        rows @ fc1.t()
        return activated @ fc2.t()

    def backward(_output: Tensor) -> tuple[Tensor, ...]:
        return grad @ fc2, grad.t() @ activated, wide @ fc1, wide.t() @ rows

    return System("dense GEMM", forward, backward, agrees=False)


def sequential_mlp(data: Inputs) -> System:
    """Megatron's own without Transformer Engine: permute, SequentialMLP, unpermute."""
    from expert_of_megatron import build

    experts, forward = build(data)
    return System("Megatron SequentialMLP", forward, leaves=(data.x, data.probs, *experts.parameters()))


def liger(data: Inputs) -> System:
    """Liger's fused MoE."""
    from liger_kernel.ops import LigerFusedMoEFunction

    return System(
        "Liger", lambda: LigerFusedMoEFunction.apply(data.x, data.fc1, data.fc2, data.ids, data.probs)
    )


def moe_ops(data: Inputs) -> System:
    """The package moe_ops: its permute, grouped GEMM and weighted unpermute."""
    import moe_ops as package

    tokens, _, _, experts, per_token = data.shape

    def forward() -> Tensor:
        rows, row_map, ends = package.permute(data.x, data.ids, E=experts)
        gate, up = package.grouped_gemm(rows, data.fc1, ends).chunk(2, dim=-1)
        rows = package.grouped_gemm(F.silu(gate) * up, data.fc2, ends)
        return package.unpermute(rows, row_map, data.probs, tokens, per_token)

    return System("moe_ops", forward)


def scattermoe(data: Inputs) -> System:
    """ScatterMoE's GLUMLP, which multiplies by the first half and gates by the second."""
    from scattermoe.mlp import GLUMLP

    _, hidden, ffn, experts, per_token = data.shape
    module = GLUMLP(hidden, ffn, experts, per_token, activation=torch.nn.SiLU()).to(data.device, data.dtype)
    with torch.no_grad():
        module.experts.weight.copy_(torch.cat(data.fc1.chunk(2, dim=1)[::-1], dim=1))
        module.output_experts.weight.copy_(data.fc2)
    ids = data.ids.long()
    forward = lambda: module(data.x, data.probs.to(data.dtype), ids)  # noqa: E731
    return System("ScatterMoE", forward, leaves=(data.x, data.probs, *module.parameters()))


def sonicmoe(data: Inputs) -> System:
    """SonicMoE's functions for routes that are given."""
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    tokens, _, _, experts, per_token = data.shape
    token_ids = torch.arange(tokens, device=data.device, dtype=torch.int32).repeat_interleave(per_token)
    stream = torch.cuda.current_stream().cuda_stream

    def forward() -> Tensor:
        output, _ = moe_general_routing_inputs(
            data.x, data.probs.reshape(-1), token_ids, data.ids.reshape(-1), data.fc1.permute(1, 2, 0), None,
            data.fc2.permute(1, 2, 0), None, experts, stream, ActivationType.SWIGLU, concat_layout=True,
        )  # fmt: skip
        return output

    return System("SonicMoE", forward)


PEERS = {
    "Megatron SequentialMLP": ("megatron.core", sequential_mlp, False),
    "Liger": ("liger_kernel", liger, True),
    "ScatterMoE": ("scattermoe", scattermoe, True),
    "SonicMoE": ("sonicmoe", sonicmoe, True),
    "moe_ops": ("moe_ops", moe_ops, True),
}
"""name -> (module, how to make it, whether it needs a GPU)"""


def own_systems(data: Inputs, chosen: str) -> tuple[list[System], list[str]]:
    """This project's backends that can run here (or the chosen one), and a line for each that cannot."""
    found, left_out = [], []
    for candidate in grouped_gemm_candidates(data.device.type, data.dtype, data.shape[1:3]):
        if chosen not in ("all", candidate.name):
            continue
        if candidate.usable:
            found += [xmoe(candidate.name, data), xmoe(candidate.name, data, recompute=True)]
        else:
            left_out.append(f"X-MoE, {candidate.name}: {candidate.reason}")
    return found, left_out


def rivals(data: Inputs, wanted: list[str]) -> tuple[list[System], list[str]]:
    """Everything else that can be timed here, and a line for each that cannot, with the reason.

    Args: data; parts of the names of those that are wanted besides the dense product, or "all".
    """

    def is_wanted(name: str) -> bool:
        return any(part == "all" or part.lower() in name.lower() for part in wanted)

    plain = [system for system in (loop(data), unfused(data)) if is_wanted(system.name)]
    found, left_out = [dense(data), *plain], []
    for name, (module, make, needs_gpu) in PEERS.items():
        if not is_wanted(name):
            continue
        if needs_gpu and data.device.type != "cuda":
            left_out.append(f"{name}: needs a GPU")
        elif name != "Megatron SequentialMLP" and not probe(module).usable:  # Megatron is imported on a prepared CPU
            left_out.append(f"{name}: {probe(module).reason}")
        else:
            try:
                found.append(make(data))
            except Exception as error:  # another version of the package, or a shape that it does not take
                left_out.append(f"{name}: {reason_of(error)}")
    return found, left_out


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
