"""A router's maps with every kind of row, and places for their choices."""

import oracles
import torch
from torch import Tensor


def random_map(tokens: int, num_experts: int, topk: int) -> tuple[Tensor, Tensor]:
    """A map [T, E] and its first K choices [T, K] int32. Some tokens make K, others fewer or more, and some none."""
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(tokens))
    routing_map = scores < max(topk, 1) / num_experts
    routing_map[::3] = scores[::3].argsort(dim=1).argsort(dim=1) < topk
    routing_map[::5] = False
    ids = [row[:topk] for row in oracles.choices_of_map(routing_map, topk)]
    return routing_map, torch.tensor(ids, dtype=torch.int32).view(tokens, topk)


def random_places(ids: Tensor) -> Tensor:
    """A place of its own [T, K] int32 for each choice [T, K], and -1 for none and for a fifth, which are dropped."""
    generator = torch.Generator().manual_seed(ids.numel())
    places = torch.randperm(ids.numel(), generator=generator).view(ids.shape)
    dropped = torch.rand(ids.shape, generator=generator) < 0.2
    return torch.where((ids < 0) | dropped, -1, places).to(torch.int32)
