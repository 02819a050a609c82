"""Mixture-of-Experts blocks that do not compute every token on every tensor-parallel rank (paper, SSMB).

Without --sequence-parallel all G tensor-parallel ranks enter the block with the same tokens. "sharded": each keeps its
share of the sequence, and the outputs are gathered at the end. "duplicated": each computes all of them, as TED does.
"given": the ranks have different tokens already, or there is only one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor

Mode = Literal["given", "sharded", "duplicated"]
Route = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def block_mode(
    option: str, tensor_parallel: int, sequence_parallel: bool, expert_tensor_parallel: int
) -> tuple[Mode, str]:
    """What a Mixture-of-Experts block does with the sequence, and the reason in words.

    Args:
        option: of --xmoe-sequence-shard.
        tensor_parallel: number of ranks that hold the same tokens.
        sequence_parallel: Megatron's --sequence-parallel.
        expert_tensor_parallel: number of ranks that share an expert.
    """
    if tensor_parallel == 1:
        return "given", "no tensor parallelism: nothing to shard"
    if sequence_parallel:
        return "given", f"sharded over {tensor_parallel} ranks already by --sequence-parallel: nothing to add"
    if option == "auto":
        option = "on" if expert_tensor_parallel == 1 else "off"
        why = f"auto: experts are {'whole' if option == 'on' else 'sharded over tensor-parallel ranks'}"
    else:
        why = f"--xmoe-sequence-shard {option}"
    if option == "on":
        return "sharded", f"each of {tensor_parallel} tensor-parallel ranks takes its share of the tokens ({why})"
    return "duplicated", f"each of {tensor_parallel} tensor-parallel ranks computes all tokens ({why})"


def shard_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of the sequence, a copy, so that the whole can be freed (paper, SSMB, before the gate).

    Args:
        x: [S, ...], the same on all ranks of `group`.
        group: G ranks; rank r takes rows r * ceil(S / G) onwards, so the last ranks may have fewer, or none.

    Returns:
        [S_r, ...]. The backward gathers the ranks' gradients: each rank gets the whole of it.
    """
    return _ShardSequence.apply(x, group)


def gather_sequence(x: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """The whole sequence from the shares of `shard_sequence` (paper, SSMB, after the combine).

    Args:
        x: [S_r, ...], this rank's share.
        length: S.
        group: G ranks.

    Returns:
        [S, ...], the same on all ranks. The backward takes this rank's share: what follows the gather is computed by
        every rank, so that the incoming gradients are equal, and complete.
    """
    return _GatherSequence.apply(x, length, group)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by `factor`."""
    return _ScaleGradient.apply(x, factor)


@contextmanager
def gradients_summed(module: torch.nn.Module, group: dist.ProcessGroup) -> Iterator[None]:
    """Within it, gradients of the parameters that `module` uses are summed over `group` in the backward.

    For replicated weights that each rank applies to its own tokens: a rank's gradient is a part of the sum. Megatron
    sums such gradients itself only with --sequence-parallel.
    """
    used = [
        (part._parameters, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    for parameters, name, parameter in used:
        parameters[name] = copy_to_tensor_model_parallel_region(parameter, group=group)
    try:
        yield
    finally:
        for parameters, name, parameter in used:
            parameters[name] = parameter


class BlockSequence:
    """The sequence of one Mixture-of-Experts layer, between the stages that Megatron calls one by one.

    `route`, `own` and `enter` belong to one pass and one input; `leave` ends the pass.
    """

    def __init__(self, mode: Mode, pg_collection: ProcessGroupCollection):
        """Args: mode; the groups `tp`, `expt_tp`, `cp` and, if there, `dp_cp`."""
        self.mode = mode
        self.group = pg_collection.tp
        experts_ranks = dist.get_process_group_ranks(pg_collection.expt_tp)
        self.copied_to_shards = mode == "duplicated" and set(experts_ranks) <= set(
            dist.get_process_group_ranks(self.group)
        )
        """Whether all ranks that share an expert hold the same tokens, and need not gather each other's."""

        self.copies = 1
        """How often each token reaches each (shard of an) expert, whose gradients would be as many times too large."""
        if mode == "duplicated":
            self.copies = self.group.size() // (len(experts_ranks) if self.copied_to_shards else 1)
        self._groups = pg_collection
        self._length = 0
        self._share: tuple[Tensor, Tensor] | None = None

    def own(self, hidden_states: Tensor) -> Tensor:
        """This rank's share of [S, B, H]; made once a pass, so that its backward communicates once."""
        if self.mode != "sharded":
            return hidden_states
        if self._share is None or self._share[0] is not hidden_states:
            self._share = hidden_states, shard_sequence(hidden_states, self.group)
        return self._share[1]

    def route(self, route: Route, router: torch.nn.Module, hidden_states: Tensor, padding_mask: Tensor | None):
        """Route this rank's tokens.

        Args:
            route: a function of (hidden_states, padding_mask) that runs `router`.
            router: Megatron's TopKRouter.
            hidden_states: [S, B, H]; padding_mask [S, B] bool, True for padding.

        Returns:
            probs and routing map, [T, E] of this rank's T tokens.
        """
        if self.mode == "given":
            return route(hidden_states, padding_mask)
        if self.mode == "sharded" and not self._needs_all_tokens(router, hidden_states, padding_mask):
            with gradients_summed(router, self.group):
                return route(self.own(hidden_states), None)
        with self._undivided(router):
            probs, routing_map = route(hidden_states, padding_mask)
        if self.mode == "duplicated":
            return probs, routing_map
        length = hidden_states.shape[0]
        own_probs = shard_sequence(probs.view(length, -1, probs.shape[1]), self.group).flatten(0, 1)
        own_map = shard_sequence(routing_map.view(length, -1, probs.shape[1]), self.group).flatten(0, 1)
        if router.enable_expert_bias and torch.is_grad_enabled():  # each token is counted on one rank
            router.local_tokens_per_expert += own_map.sum(dim=0) - routing_map.sum(dim=0)
        return own_probs, own_map

    def _needs_all_tokens(self, router: torch.nn.Module, hidden_states: Tensor, padding_mask: Tensor | None) -> bool:
        """Whether the router gives something else on shares of the sequence than on the whole.

        Its losses take all ranks for equally large, without padding; Sinkhorn balances the tokens that it sees; noise
        is drawn by position. The gate is a small part of the block, so it then runs on every rank.
        """
        return (
            hidden_states.shape[0] % self.group.size() != 0
            or padding_mask is not None
            or router.routing_type == "sinkhorn"
            or router.config.moe_input_jitter_eps is not None
        )

    @contextmanager
    def _undivided(self, router: torch.nn.Module) -> Iterator[None]:
        """Within it, the router knows that tensor-parallel ranks have the same tokens, each with the whole gradient."""
        data_parallel = getattr(self._groups, "dp_cp", None)
        groups = {
            "tp_cp_group": self._groups.cp,
            "tp_dp_cp_group": data_parallel or parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        before = {name: getattr(router, name) for name in groups}
        vars(router).update(groups)
        try:
            yield
        finally:
            vars(router).update(before)

    def enter(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and probabilities to dispatch, from the whole [S, B, H] and this rank's probs [T, E]."""
        self._length = hidden_states.shape[0]
        if self.copies > 1:
            return scale_gradient(hidden_states, self.copies), scale_gradient(probs, self.copies)
        own, self._share = self.own(hidden_states), None
        return own, probs

    def leave(self, output: Tensor) -> Tensor:
        """The block's output [S, B, H] from that of this rank's tokens."""
        if self.mode == "sharded":
            return gather_sequence(output, self._length, self.group)
        return scale_gradient(output, 1 / self.copies) if self.copies > 1 else output


def share_of(length: int, group: dist.ProcessGroup) -> slice:
    """This rank's rows of a sequence."""
    rows = _rows_per_rank(length, group)
    first = min(group.rank() * rows, length)
    return slice(first, min(first + rows, length))


def _rows_per_rank(length: int, group: dist.ProcessGroup) -> int:
    return -(-length // group.size())


def _gathered(x: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """All ranks' shares; only the last rows of the exchange are padding, so that the result is a prefix of it."""
    rows = _rows_per_rank(length, group)
    if x.shape[0] < rows:
        x = torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])
    gathered = x.new_empty(rows * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered[:length]


class _ShardSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.length, ctx.group = x.shape[0], group
        return x[share_of(x.shape[0], group)].clone()

    @staticmethod
    def backward(ctx, grad):
        return _gathered(grad, ctx.length, ctx.group), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, length, group):
        ctx.length, ctx.group = length, group
        return _gathered(x, length, group)

    @staticmethod
    def backward(ctx, grad):
        return grad[share_of(ctx.length, ctx.group)], None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None
