"""What the operations and a Mixture-of-Experts layer mean, in loops over single routes. Knows nothing of megatron_xmoe.

Letters: T tokens, K routes per token, E experts, N routes that exist, H hidden size, F FFN size of an expert.
Gradients come from autograd over the loops, in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """Routes that exist, ordered by expert, then by token, then by the token's own order."""

    token_ids: list[int]
    expert_ids: list[int]
    slots: list[int]
    """Which of its token's choices each route is."""

    tokens_per_expert: list[int]
    inverse: list[list[int]]
    """[T][K]: position of each choice in the lists above, -1 where there is none."""


def routes(choices: Sequence[Sequence[int]], num_experts: int) -> Routes:
    """Order the experts that tokens chose: `choices` [T][K], -1 for none."""
    found = [
        (token, expert, slot)
        for expert in range(num_experts)
        for token, chosen in enumerate(choices)
        for slot, choice in enumerate(chosen)
        if choice == expert
    ]
    inverse = [[-1] * len(chosen) for chosen in choices]
    for position, (token, _, slot) in enumerate(found):
        inverse[token][slot] = position
    return Routes(
        token_ids=[token for token, _, _ in found],
        expert_ids=[expert for _, expert, _ in found],
        slots=[slot for _, _, slot in found],
        tokens_per_expert=[sum(e == expert for _, e, _ in found) for expert in range(num_experts)],
        inverse=inverse,
    )


def choices_of_map(routing_map: Tensor, topk: int) -> list[list[int]]:
    """[T][K] experts of each row of a boolean map [T, E], ascending, filled up with -1."""
    chosen = [[e for e, there in enumerate(row) if there] for row in routing_map.tolist()]
    return [experts + [-1] * (topk - len(experts)) for experts in chosen]


def gradient_of_map(grad: Tensor, inverse: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """[T, E]: the entry of `grad` [N] that `inverse` [T, K] names for each choice of `ids` [T, K], zeros elsewhere."""
    result = torch.zeros(len(ids), num_experts, dtype=grad.dtype)
    for t, (places, experts) in enumerate(zip(inverse.tolist(), ids.tolist(), strict=True)):
        for place, expert in zip(places, experts, strict=True):
            if place >= 0:
                result[t, expert] = grad[place]
    return result


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` [R, H] at `index` [M], zeros for -1."""
    zeros = torch.zeros(x.shape[1], dtype=x.dtype)
    return _stack([x[i] if i >= 0 else zeros for i in index.tolist()], x)


def gather_sum(y: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """result[t] = sum over k of weights[t, k] * y[index[t, k]], from the first k to the last, in y's dtype."""
    sums = []
    for t, row in enumerate(index.tolist()):
        total = torch.zeros(y.shape[1], dtype=y.dtype)
        for k, i in enumerate(row):
            if i >= 0:
                total = total + (y[i] if weights is None else y[i] * weights[t, k])
        sums.append(total)
    return _stack(sums, y)


def swiglu(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """An expert without bias for one token [H]: `fc1` [2F, H] holds gate, then up; `fc2` [H, F]."""
    gate, up = (fc1 @ x).chunk(2)
    return fc2 @ (F.silu(gate) * up)


def grouped_mlp(
    x: Tensor,
    probs: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    *biases: Tensor,
    index: Sequence[int],
    experts: Sequence[int],
    function: Callable[[Tensor], Tensor],
    gated: bool,
) -> Tensor:
    """Row m: expert `experts[m]` applied to x[index[m]], times probs[m], its second bias too.

    Args:
        x: [R, H]. probs: [M]. fc1: [E, 2F, H] (gate, then up) if gated, else [E, F, H]. fc2: [E, H, F].
        biases: none, or [E, 2F] (or [E, F]) and [E, H].
    """
    rows = []
    for m, (i, e) in enumerate(zip(index, experts, strict=True)):
        hidden = fc1[e] @ x[i] + (biases[0][e] if biases else 0)
        if gated:
            gate, up = hidden.chunk(2)
            activated = function(gate) * up
        else:
            activated = function(hidden)
        rows.append(probs[m] * (fc2[e] @ activated + (biases[1][e] if biases else 0)))
    return _stack(rows, x)


def router(hidden_states: Tensor, weight: Tensor, topk: int, pre_softmax: bool) -> tuple[Tensor, Tensor]:
    """Softmax top-k routing: probs [T, E], 0 where not chosen, and the map [T, E], from tokens [T, H], weight [E, H].

    Args:
        pre_softmax: softmax over all experts before the choice, instead of over the chosen ones.
    """
    probs, maps = [], []
    for token in hidden_states:
        logits = weight @ token
        best = sorted(range(len(logits)), key=lambda expert: -logits[expert].item())[:topk]
        chosen = torch.zeros(len(logits), dtype=torch.bool)
        chosen[best] = True
        shown = logits if pre_softmax else logits.masked_fill(~chosen, -torch.inf)
        probs.append(torch.softmax(shown, dim=0) * chosen)
        maps.append(chosen)
    empty = hidden_states.new_zeros(0, weight.shape[0])
    return (torch.stack(probs), torch.stack(maps)) if probs else (empty, empty.bool())


def moe_layer(
    hidden_states: Tensor, probs: Tensor, routing_map: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """Per token [T, H] the sum over its experts of prob * expert(token)."""
    outputs = []
    for token, token_probs, chosen in zip(hidden_states, probs, routing_map.tolist(), strict=True):
        total = torch.zeros_like(token)
        for expert, there in enumerate(chosen):
            if there:
                total = total + token_probs[expert] * experts[expert](token)
        outputs.append(total)
    return _stack(outputs, hidden_states)


def attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Softmax attention, one head and one query at a time.

    Args:
        query: [S, B, N, D]. key: [C, B, G, D]. value: [C, B, G, V], with N a multiple of G.
        hidden: [S, C] bool, True where a key is not seen.

    Returns:
        [S, B, N * V].
    """
    per_group = query.shape[2] // key.shape[2]
    rows = []
    for s in range(query.shape[0]):
        for b in range(query.shape[1]):
            for n in range(query.shape[2]):
                scores = scale * key[:, b, n // per_group] @ query[s, b, n]
                weights = torch.softmax(scores.masked_fill(hidden[s], -torch.inf), dim=0)
                rows.append(weights @ value[:, b, n // per_group])
    return torch.stack(rows).view(*query.shape[:2], -1)


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Result of `function` in float64, and its gradients for every input, given the result's gradient.

    An input that the result does not depend on has a gradient of zeros.
    """
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    result = function(*leaves)
    if result.requires_grad:
        found = torch.autograd.grad(result, leaves, grad.double(), allow_unused=True)
    else:
        found = [None] * len(leaves)
    pairs = zip(found, leaves, strict=True)
    return result.detach(), [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]


def _stack(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like.new_zeros(0, like.shape[1])
