"""Keeps what Megatron's training loop computed, at full precision: losses, gradient norms and parameters.

Only for runs of tests/fork_server.py, in the process that trains.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Record:
    """What one rank saw."""

    losses: list[dict[str, float]] = field(default_factory=list)
    """Each iteration's losses by name; empty dictionaries where the rank has no loss."""

    grad_norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    """Whether the optimizer skipped the iteration."""

    parameters: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Parameters before and after the first step that was not skipped, by names that both backends share: 'name on
    disk @ place' -> this rank's part; of 16-bit models the optimizer's fp32 copies, by Megatron's module names."""

    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of the first iteration of an fp32 model, as its optimizer got them, by the names of `parameters`; none with the
    distributed optimizer, of which every rank has a part."""


def install(directory: Path, rank: int) -> None:
    """Record every training step of this process in `directory`/RANK.pt.

    With the environment variable DROP_EARLIEST, stock Megatron's router drops by the loop below.
    """
    from megatron.core.transformer.moe import router
    from megatron.training import get_args, training

    if os.environ.get("DROP_EARLIEST"):
        router.apply_router_token_dropping = drop_by_position
    original, record = training.train_step, Record()

    def train_step(forward_step_func, data_iterator, model, *args, **kwargs):
        if not record.parameters:
            record.parameters.append(fp32_copies(model) or parameters(model))
        result = original(forward_step_func, data_iterator, model, *args, **kwargs)
        record.losses.append({name: float(loss) for name, loss in result[0].items()})
        record.skipped.append(bool(result[1]))
        record.grad_norms.append(float(result[5]) if result[5] is not None else float("nan"))
        if len(record.losses) == 1 and not fp32_copies(model) and not get_args().use_distributed_optimizer:
            record.gradients = gradients(model)
        if len(record.parameters) == 1 and not record.skipped[-1]:
            record.parameters.append(fp32_copies(model) or parameters(model))
        torch.save(record, directory / f"{rank}.pt")
        return result

    training.train_step = train_step


def drop_by_position(
    routing_probs: torch.Tensor, routing_map: torch.Tensor, router_topk: int, capacity_factor: float, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's dropping by position, with the choice among equals made: an expert keeps its earliest tokens."""
    assert options == {"drop_policy": "position", "pad_to_capacity": False}
    tokens, experts = routing_map.shape
    capacity = math.ceil(tokens * router_topk / experts * capacity_factor)
    kept = torch.zeros_like(routing_map)
    for expert in range(experts):
        taken = 0
        for token in range(tokens):
            if routing_map[token, expert] and taken < capacity:
                kept[token, expert] = True
                taken += 1
    return routing_probs * kept, kept


def parameters(model: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """This rank's parameters and buffers under their names in a distributed checkpoint, which both backends share."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories
    from megatron.training import get_args
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata

    metadata = _build_sharded_state_dict_metadata(get_args())
    state = {str(i): chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(model)}
    apply_factories(state)
    return {
        f"{entry.key} @ {entry.global_offset}": entry.data.detach().clone()
        for entry in nested_values(state)
        if isinstance(entry, ShardedTensor)
    }


def gradients(model: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """This rank's gradients under the names of `parameters`."""
    own = {parameter: parameter.data for chunk in model for parameter in chunk.parameters()}
    for parameter in own:
        parameter.data = parameter.main_grad.to(parameter.dtype)
    found = parameters(model)
    for parameter, data in own.items():
        parameter.data = data
    return {name: tensor for name, tensor in found.items() if "expert_bias" not in name}


def fp32_copies(model: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What the optimizer updates in place of a 16-bit model's parameters; grouped experts one by one."""
    found = {}
    for i, chunk in enumerate(model):
        for name, parameter in chunk.named_parameters():
            copy = getattr(parameter, "main_param", None)
            if copy is not None and ".experts.linear_fc" in name:
                experts = {name.replace(".experts.", f".experts.local_experts.{j}."): e for j, e in enumerate(copy)}
                found |= {f"{i} {name}": expert.detach().clone() for name, expert in experts.items()}
            elif copy is not None:
                found[f"{i} {name}"] = copy.detach().clone()
    return found
