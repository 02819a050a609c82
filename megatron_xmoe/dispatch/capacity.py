"""Expert capacity: how many routes of a rank's tokens an expert takes before the rest is dropped."""

import math


def expert_capacity(
    num_tokens: int, topk: int, num_experts: int, factor: float | None, minimum: int = 0
) -> int | None:
    """Megatron's capacity, ceil(T * K / E * c), and at least `minimum`; None where nothing is dropped.

    Args:
        num_tokens: T, of this rank's micro-batch: every rank drops among its own tokens.
        topk: K, experts of a token.
        num_experts: E.
        factor: c of --moe-expert-capacity-factor; None drops nothing.
        minimum: of --xmoe-min-capacity, for micro-batches so small that the formula gives next to nothing.
    """
    if factor is None:
        return None
    return max(math.ceil(num_tokens * topk / num_experts * factor), minimum)
