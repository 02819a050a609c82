"""The passes that benchmark_dispatch.py times: dispatch and combine alone, and a whole layer, with either dispatcher.

Imported once the platform is in place, because it imports Megatron.
"""

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dispatch_wire import COMBINE, DISPATCH, Span, Wire, stage_times
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.experts import XMoEGroupedMLP
from megatron_xmoe.layer import XMoELayer

ONLY_DISPATCH_FFN = 16  # of experts that are built, but not computed
SEED = 1234


@dataclass(frozen=True)
class Setting:
    """What a measurement is of."""

    tokens: int
    """T, of a rank."""

    topk: int
    experts: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    ep_size: int
    ranks_per_node: str | None
    """Of --xmoe-ranks-per-node."""


@dataclass(frozen=True)
class Repeat:
    """How often something is done."""

    warm_up: int
    iterations: int


@dataclass
class Pass:
    """A forward and backward pass: what it computed, what it sent and how long it took."""

    output: Tensor
    gradients: list[Tensor]
    """Of the input, and where routes were given, of the routing weights."""

    wire: Wire
    """Of the forward pass."""

    backward_wire: Wire
    milliseconds: dict[str, float]
    """Medians, the slowest rank's."""


def build_layer(setting: Setting, dispatcher: str, ffn: int) -> XMoELayer:
    """A layer with grouped experts of FFN size `ffn`; every call gives the same weights."""
    on_cpu = setting.device.type == "cpu"
    model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
    torch.manual_seed(SEED)
    config = TransformerConfig(
        num_layers=1, hidden_size=setting.hidden_size, num_attention_heads=1, num_moe_experts=setting.experts,
        moe_router_topk=setting.topk, moe_ffn_hidden_size=ffn, ffn_hidden_size=ffn, gated_linear_unit=True,
        activation_func=F.silu, add_bias_linear=False, bias_activation_fusion=False, gradient_accumulation_fusion=False,
        moe_router_load_balancing_type="none", moe_router_pre_softmax=setting.topk == 1, moe_router_dtype="fp32",
        params_dtype=setting.dtype, bf16=setting.dtype == torch.bfloat16, moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=on_cpu, expert_model_parallel_size=setting.ep_size, hidden_dropout=0.0,
    )  # fmt: skip
    xmoe = XMoEConfig(
        moe_backend="xmoe", xmoe_dispatcher=dispatcher, xmoe_ranks_per_node=setting.ranks_per_node
    )
    submodules = get_moe_module_spec(use_te=False, num_experts=setting.experts).keywords["submodules"]
    layer = XMoELayer(config, submodules=replace(submodules, experts=XMoEGroupedMLP), layer_number=1, xmoe=xmoe)
    return layer.to(setting.device)


def random_input(setting: Setting) -> tuple[Tensor, Tensor]:
    """Tokens [T, 1, H] of this rank, and the gradient of the output."""
    generator = torch.Generator(setting.device).manual_seed(SEED + dist.get_rank())
    shape = (2, setting.tokens, 1, setting.hidden_size)
    both = torch.randn(shape, generator=generator, device=setting.device, dtype=torch.float32).to(setting.dtype)
    return both[0].requires_grad_(), both[1]


def uniform_routes(setting: Setting) -> tuple[Tensor, Tensor]:
    """Weights [T, E] fp32 and map [T, E]: every set of K experts is as likely."""
    generator = torch.Generator(setting.device).manual_seed(SEED - 1 - dist.get_rank())
    scores = torch.rand(setting.tokens, setting.experts, generator=generator, device=setting.device)
    best = scores.topk(setting.topk, dim=1)
    routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best.indices, True)
    probs = torch.zeros_like(scores).scatter_(1, best.indices, best.values / best.values.sum(dim=1, keepdim=True))
    return probs.requires_grad_(), routing_map


def run_parts(dispatcher, x: Tensor, probs: Tensor, routing_map: Tensor, wire: Wire | None = None):
    """Dispatch, experts that only multiply by the weight, combine; each of Megatron's six methods is a part of `wire`.

    Returns:
        The output [T, 1, H]; the times of dispatch and of combine.
    """
    dispatching = Span(x.device)
    rows, weights = _part(wire, DISPATCH[0], dispatcher.dispatch_preprocess, x, routing_map, probs)
    rows, weights = _part(wire, DISPATCH[1], dispatcher.token_dispatch, rows, weights)
    rows, _, weights = _part(wire, DISPATCH[2], dispatcher.dispatch_postprocess, rows, weights)
    dispatching.stop()
    rows = (rows * weights.unsqueeze(1)).to(rows.dtype)
    combining = Span(x.device)
    for name in COMBINE:
        rows = _part(wire, name, getattr(dispatcher, name), rows)
    combining.stop()
    return rows, dispatching, combining


def _part(wire: Wire | None, name: str, method: Callable, *args):
    if wire is None:
        return method(*args)
    with wire.in_part(name):
        return method(*args)


def measure_dispatch(setting: Setting, dispatchers: dict, node_of: dict[int, int], repeat: Repeat) -> dict[str, Pass]:
    """Dispatch and combine with uniform routing: times of many passes, and one in which exchanges are noted."""
    x, grad = random_input(setting)
    probs, routing_map = uniform_routes(setting)

    def passing(dispatcher):
        def run():
            output, dispatching, combining = run_parts(dispatcher, x, probs, routing_map)
            backward = Span(setting.device)
            torch.autograd.grad(output, (x, probs), grad)
            backward.stop()
            return lambda: _times_of_a_pass(dispatching, combining, backward)

        return run

    times = timed(setting, {name: passing(dispatcher) for name, dispatcher in dispatchers.items()}, repeat)
    passes = {}
    for name, dispatcher in dispatchers.items():
        wires = [Wire(node_of, setting.hidden_size, setting.device) for _ in range(2)]
        with wires[0].listening():
            output, *_ = run_parts(dispatcher, x, probs, routing_map, wires[0])
        with wires[1].listening():
            gradients = torch.autograd.grad(output, (x, probs), grad)
        synchronize(setting.device)
        passes[name] = Pass(output.detach(), list(gradients), *wires, times[name])
    return passes


def _times_of_a_pass(dispatching: Span, combining: Span, backward: Span) -> dict[str, float]:
    dispatch, combine = dispatching.milliseconds(), combining.milliseconds()
    return {"dispatch": dispatch, "combine": combine, "both": dispatch + combine, "backward": backward.milliseconds()}


def measure_stages(setting: Setting, dispatchers: dict, node_of: dict[int, int], repeat: Repeat) -> dict[str, dict]:
    """Times of each stage of dispatch and combine, in passes that overlap nothing."""
    x, _ = random_input(setting)
    probs, routing_map = uniform_routes(setting)

    def noting(dispatcher):
        def run():
            wire = Wire(node_of, setting.hidden_size, setting.device, one_by_one=True)
            with wire.listening():
                run_parts(dispatcher, x, probs, routing_map, wire)
            return lambda: stage_times(wire)

        return run

    return timed(setting, {name: noting(dispatcher) for name, dispatcher in dispatchers.items()}, repeat)


def measure_layer(setting: Setting, layers: dict[str, XMoELayer], repeat: Repeat) -> tuple[dict, dict]:
    """Forward, and forward with backward, of whole layers: times; outputs and the input's gradients."""
    x, grad = random_input(setting)
    results = {}

    def passing(name, layer):
        def run():
            x.grad = None
            layer.zero_grad(set_to_none=True)
            forward, both = Span(setting.device), Span(setting.device)
            output, _ = layer(x)
            forward.stop()
            output.backward(grad)
            both.stop()
            results[name] = output.detach(), [x.grad]
            return lambda: {"forward": forward.milliseconds(), "forward+backward": both.milliseconds()}

        return run

    return timed(setting, {name: passing(name, layer) for name, layer in layers.items()}, repeat), results


def timed(setting: Setting, calls: dict[str, Callable], repeat: Repeat) -> dict[str, dict[str, float]]:
    """Median times in ms of several calls, which take turns; the slowest rank's.

    Args: each call returns a function that gives its times by name, once the GPU has got so far.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for i in range(repeat.warm_up + repeat.iterations):
        for name, call in calls.items():
            barrier(setting.device)
            times = call()
            synchronize(setting.device)
            if i >= repeat.warm_up:
                found[name].append(times())
    return {
        name: {
            what: largest(statistics.median(times[what] for times in passes), setting.device) for what in passes[0]
        }
        for name, passes in found.items()
    }


def count_syncs(setting: Setting, layer: XMoELayer) -> tuple[int, int]:
    """Times that the host waits for the GPU in a forward pass of the layer, and in its backward."""
    x, grad = random_input(setting)
    layer(x)[0].backward(grad)  # whatever happens the first time only
    synchronize(setting.device)
    with _waits() as forward:
        output, _ = layer(x)
    synchronize(setting.device)
    with _waits() as backward:
        output.backward(grad)
    synchronize(setting.device)
    return len(forward), len(backward)


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Collects what torch's debug mode warns of, and waits for events and streams, which it does not see."""
    waits: list[str] = []

    def noting(wait):
        def noted(*args, **kwargs):
            waits.append(wait.__qualname__)
            return wait(*args, **kwargs)

        return noted

    with ExitStack() as stack:
        for owner in (torch.cuda.Event, torch.cuda.Stream, torch.cuda):
            stack.enter_context(mock.patch.object(owner, "synchronize", noting(owner.synchronize)))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("warn")
        yield waits
        waits += [str(one.message) for one in caught if "synchronizing CUDA operation" in str(one.message)]


def barrier(device: torch.device) -> None:
    """Wait for all ranks."""
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def largest(value: float, device: torch.device) -> float:
    """The largest of all ranks' values."""
    return _reduced(value, dist.ReduceOp.MAX, device)


def average(value: float, device: torch.device) -> float:
    """The mean of all ranks' values."""
    return _reduced(value, dist.ReduceOp.SUM, device) / dist.get_world_size()


def _reduced(value: float, operation, device: torch.device) -> float:
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, operation)
    return tensor.item()
