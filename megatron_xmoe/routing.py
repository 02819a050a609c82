"""Ways to choose and weigh experts that Megatron's router does not have."""

from collections.abc import Callable

import torch
from torch import Tensor


class BestOfGroup:
    """Limits each token to groups of experts ranked by their single best score, as DeepSeek-V2 does.

    Megatron adds up the best top-k // groups scores of a group. It asks this object in place of its own replay of
    recorded routes.
    """

    layer_number: int | None = None  # set by the router

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: Callable
    ) -> tuple[Tensor, Tensor]:
        """Best experts of the best groups.

        Args: scores [T, E]; topk experts, of group_topk of num_groups groups; default, Megatron's function.

        Returns:
            scores [T, K] and experts [T, K].
        """
        if not group_topk:
            return default(scores, topk, num_groups, group_topk)
        grouped = scores.view(len(scores), num_groups, -1)
        best = grouped.amax(dim=-1).topk(group_topk, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(grouped[:, :, 0], dtype=torch.bool).scatter_(1, best, True)
        limited = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).view_as(scores)
        return limited.topk(topk, dim=-1)


def raw_logits(router, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
    """The router's logits as weights of the chosen experts, as the original X-MoE's code has them.

    Args:
        router: Megatron's TopKRouter.
        hidden_states: its input, [S, B, H].
        probs: [T, E], what it returned; losses that hang on them still get their gradient.
        routing_map: [T, E] bool.

    Returns:
        [T, E], zero where an expert is not chosen.
    """
    logits = router.gating(hidden_states).view_as(probs)
    return torch.where(routing_map, logits, 0).to(probs.dtype) + 0 * probs
