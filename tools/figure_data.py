"""What docs/algorithms.md shows, computed by the code that it describes: the data of its figures, and its tables."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from benchmark_memory import Model

from megatron_xmoe.dispatch.capacity import expert_capacity
from megatron_xmoe.dispatch.choice import LEAST_SAVING, network_rows
from megatron_xmoe.dispatch.pilots import Places, choose_copies, salt_of
from megatron_xmoe.ops import Routes, build_routes, build_routes_from_map
from megatron_xmoe.sequence_shard import share_of

RECIPES = Path(__file__).resolve().parent / "recipes"

# The example of padding-free buffers: a token's experts and their weights; expert 2 is popular.
CHOICES = (
    {0: 0.7, 2: 0.3}, {1: 0.4, 2: 0.6}, {2: 0.8, 3: 0.2}, {0: 0.6, 2: 0.4}, {1: 0.5, 2: 0.5}, {0: 0.3, 2: 0.7},
)  # fmt: skip
EXPERTS, TOPK, FACTOR = 4, 2, 1.25
POLICIES = ("probs", "position")

# The example of redundancy bypassing: two nodes of three ranks with two experts each, and two tokens of rank 0.
NODE_OF, LOCAL_EXPERTS = (0, 0, 0, 1, 1, 1), 2
TOKENS = ((0, 3, 6, 7, 9), (2, 5, 8, 10, 11))

RANKS, NODE_SIZES = (16, 32, 64, 128, 256), (4, 8, 16)
MANY_EXPERTS, MANY_TOPK = 256, 8  # of X-MoE Large and DeepSeek-V3
FEW_EXPERTS, FEW_TOPK = 64, 6  # of X-MoE Small and DeepSeek-MoE
MEASURED_TOKENS = 4096

LENGTH, SHARES = 10, 4  # of the sequence; tensor-parallel ranks

MODELS = (
    ("Qwen3-30B-A3B", "qwen3_30b_a3b"), ("OLMoE-1B-7B", "olmoe_1b_7b"), ("DeepSeek-MoE-16B", "deepseek_moe_16b"),
    ("DeepSeek-V3", "deepseek_v3"), ("X-MoE Medium", "xmoe_medium"), ("X-MoE Super", "xmoe_super"),
    ("Arctic", None), ("Mixtral-8x7B", "mixtral_8x7b"),
)  # fmt: skip
ARCTIC = 2, 4864  # K and F, of the paper: there is no recipe
FACTORS = (1.0, 1.25)


class Row(NamedTuple):
    """A row that one rank sends to another."""

    sender: int
    receiver: int
    token: int


class Break(NamedTuple):
    """From which sequence on sharding it saves more than sharding the experts, by capacity factor."""

    model: str
    topk: int
    ffn: int
    lengths: dict[str, float]


class _Place:
    """A tensor-parallel rank, where no group is needed to ask about its share."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


def example_routes(policy: str = "probs", capacity: int | None = None) -> Routes:
    """The padding-free buffer of CHOICES, from the pair that Megatron's router gives."""
    probs = torch.zeros(len(CHOICES), EXPERTS)
    for token, weights in enumerate(CHOICES):
        for expert, weight in weights.items():
            probs[token, expert] = weight
    return build_routes_from_map(probs > 0, probs, TOPK, capacity, policy)


def example_capacity() -> int:
    """Routes that an expert keeps in the example with dropping."""
    return expert_capacity(len(CHOICES), TOPK, EXPERTS, FACTOR)


def arrays_of(routes: Routes) -> dict:
    """The ERI arrays and the inverse as lists, without what is behind the last kept route."""
    kept = int(routes.tokens_per_expert.sum())
    return {
        "token_ids": routes.token_ids[:kept].tolist(),
        "expert_ids": routes.expert_ids[:kept].tolist(),
        "combine_weights": [round(weight, 3) for weight in routes.combine_weights[:kept].tolist()],
        "tokens_per_expert": routes.tokens_per_expert.tolist(),
        "inverse": routes.inverse.tolist(),
    }


def buffers() -> dict:
    """The example without dropping and with it, and the rows [E, C] of a padded buffer for each."""
    capacity = example_capacity()
    whole = arrays_of(example_routes())
    kept = {policy: arrays_of(example_routes(policy, capacity)) for policy in POLICIES}
    return {"all": whole, "kept": kept, "capacity": capacity, "padded": [max(whole["tokens_per_expert"]), capacity]}


def plain_rows() -> list[Row]:
    """Rows of the plain dispatcher for TOKENS, of rank 0: one for each route."""
    return [Row(0, e // LOCAL_EXPERTS, token) for token, experts in enumerate(TOKENS) for e in experts]


def bypass_rows() -> tuple[list[Row], list[Row]]:
    """Rows of redundancy bypassing for TOKENS: what their rank sends, and what the pilots' ranks forward."""
    ids = torch.tensor(TOKENS)
    routes = build_routes(ids, torch.ones(ids.shape), len(NODE_OF) * LOCAL_EXPERTS)
    copies = choose_copies(routes, Places.of(NODE_OF, 0, LOCAL_EXPERTS, "cpu"), salt_of(1, 0))
    width = max(Counter(NODE_OF).values())
    sent, forwarded = [], []
    for token, bins in enumerate(copies.bins.tolist()):
        for pilot, place in (divmod(entry, width) for entry in bins if 0 <= entry < len(NODE_OF) * width):
            receiver = [rank for rank, node in enumerate(NODE_OF) if node == NODE_OF[pilot]][place]
            if receiver == pilot:
                sent.append(Row(0, pilot, token))
            else:
                forwarded.append(Row(pilot, receiver, token))
    return sent, forwarded


def crossing(rows: list[Row]) -> int:
    """Rows that go to another node."""
    return sum(NODE_OF[row.sender] != NODE_OF[row.receiver] for row in rows)


def inside(rows: list[Row]) -> int:
    """Rows that go to another rank of the same node."""
    return sum(row.sender != row.receiver for row in rows) - crossing(rows)


def nodes(ranks: int, node_size: int) -> tuple[int, ...]:
    """Node of each rank, nodes one after the other."""
    return tuple(rank // node_size for rank in range(ranks))


def redundancy(ranks: int, node_size: int, topk: int = MANY_TOPK, experts: int = MANY_EXPERTS) -> float:
    """Share of the rows between nodes that need not be sent, if routing is uniform; the rule of `auto` uses it."""
    plain, once = network_rows(nodes(ranks, node_size), topk, experts)
    return 1 - once / plain


def measured_redundancy(ranks: int, node_size: int, topk: int = MANY_TOPK, experts: int = MANY_EXPERTS) -> float:
    """The same, counted: random routes of rank 0's tokens, and the rows that choose_copies sends for them."""
    node_of, local = nodes(ranks, node_size), experts // ranks
    generator = torch.Generator().manual_seed(ranks)
    ids = torch.rand(MEASURED_TOKENS, experts, generator=generator).topk(topk).indices
    places = Places.of(node_of, 0, local, "cpu")
    copies = choose_copies(build_routes(ids, torch.ones(ids.shape), experts), places, 1)
    sent = copies.told[0, :, :node_size][torch.arange(ranks), torch.from_numpy(places.local_of)]
    rows = int(sent[torch.from_numpy(places.remote)].sum())
    return 1 - rows / int((ids >= node_size * local).sum())


def redundancies() -> dict:
    """Closed form by size of a node, for few experts, and counted for eight ranks a node."""
    few = [ranks for ranks in RANKS if ranks <= FEW_EXPERTS]
    return {
        "ranks": list(RANKS),
        "many": {str(size): [round(redundancy(ranks, size), 5) for ranks in RANKS if ranks > size]
                 for size in NODE_SIZES},
        "few": [round(redundancy(ranks, 8, FEW_TOPK, FEW_EXPERTS), 5) for ranks in few],
        "measured many": [round(measured_redundancy(ranks, 8), 5) for ranks in RANKS],
        "measured few": [round(measured_redundancy(ranks, 8, FEW_TOPK, FEW_EXPERTS), 5) for ranks in few],
        "least": LEAST_SAVING,
    }  # fmt: skip


def shares() -> dict:
    """First and last position of each rank's tokens in the block, off and on."""
    on = [share_of(LENGTH, _Place(rank, SHARES)) for rank in range(SHARES)]
    return {"off": [[0, LENGTH]] * SHARES, "on": [[part.start, part.stop] for part in on]}


def sizes_of(recipe: str | None) -> tuple[int, int]:
    """K and F of a model, as its recipe has them."""
    if recipe is None:
        return ARCTIC
    text = (RECIPES / f"{recipe}.sh").read_text(encoding="utf-8")
    found = [re.search(rf"--{option} (\d+)", text) for option in ("moe-router-topk", "moe-ffn-hidden-size")]
    return int(found[0][1]), int(found[1][1])


def break_evens() -> list[Break]:
    """The models, the shortest sequence first."""
    found = []
    for name, recipe in MODELS:
        topk, ffn = sizes_of(recipe)
        lengths = {
            f"{factor:g}": Model(1, 1, ffn, 1, topk, 1, 1, capacity_factor=factor).break_even() for factor in FACTORS
        }
        found.append(Break(name, topk, ffn, lengths))
    return sorted(found, key=lambda one: one.lengths["1"])


def markdown(head: list[str], rows: list[list]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tables() -> dict[str, str]:
    """The page's tables of computed numbers, by what they show."""
    whole, kept = buffers()["all"], buffers()["kept"]
    names = ("token_ids", "expert_ids", "combine_weights", "tokens_per_expert", "inverse")
    arrays = [
        [f"`{name}`", *(" ".join(map(str, of[name])).replace("[", "").replace("]", ";").replace(",", "").rstrip(";")
                        for of in (whole, *kept.values()))]
        for name in names
    ]  # fmt: skip
    capacity = example_capacity()
    (sent, forwarded), plain = bypass_rows(), plain_rows()
    percent = [
        [ranks, *(f"{redundancy(ranks, size):.1%}" if ranks > size else "one node" for size in NODE_SIZES)]
        for ranks in RANKS
    ]
    few = [[ranks, f"{redundancy(ranks, 8, FEW_TOPK, FEW_EXPERTS):.1%}"] for ranks in RANKS if ranks <= FEW_EXPERTS]
    return {
        "arrays": markdown(["", "no dropping", *(f"capacity {capacity}, `{policy}`" for policy in POLICIES)], arrays),
        "rows": markdown(
            ["rows of the two tokens", "to the other node", "inside a node"],
            [["alltoall", crossing(plain), inside(plain)],
             ["rbd", crossing(sent), f"{inside(sent)} own + {len(forwarded)} forwarded"]],
        ),
        "redundancy": markdown(["EP ranks", *(f"{size} ranks a node" for size in NODE_SIZES)], percent),
        "few": markdown(["EP ranks", "8 ranks a node"], few),
        "break-even": markdown(
            ["model", "K", "F", *(f"c = {factor:g}" for factor in FACTORS)],
            [[one.model, one.topk, one.ffn, *(f"{length:.0f}" for length in one.lengths.values())]
             for one in break_evens()],
        ),
    }  # fmt: skip


def figures() -> dict[str, dict]:
    """Name of each figure, and the data that it is drawn from."""
    sent, forwarded = bypass_rows()
    return {
        "pft": buffers(),
        "rbd": {"plain": plain_rows(), "sent": sent, "forwarded": forwarded},
        "redundancy": redundancies(),
        "ssmb": shares(),
        "break_even": {"models": break_evens()},
    }
