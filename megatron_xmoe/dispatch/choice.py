"""The rule of `--xmoe-dispatcher auto`: when sending one copy per token and node is worth its extra stage."""

from dataclasses import dataclass
from math import comb
from typing import Literal

LEAST_SAVING = 0.1
"""Share of the network's rows that must be saved. Below it the additional exchange inside the node, and the merge of
what both bring, cost about what they save; a judgement, not a measured break-even."""


@dataclass(frozen=True)
class Choice:
    """A dispatcher and why it was chosen."""

    dispatcher: Literal["alltoall", "rbd"]

    reason: str
    """One sentence with the numbers that decided."""


def network_rows(node_of: tuple[int, ...], topk: int, num_experts: int) -> tuple[float, float]:
    """Rows that a token sends to other nodes on average, if routing is uniform: plainly, and one per node.

    With n equal nodes the latter is D * (n - 1) / n, where D = n * (1 - C(E - E/n, K) / C(E, K)) is the number of nodes
    that a token reaches (paper, section 4.2). Unequal nodes count with their own numbers of experts and tokens.

    Args:
        node_of: [G] node of each rank of the expert-parallel group; every rank has E / G experts and as many tokens.
        topk: K.
        num_experts: E.
    """
    ranks = len(node_of)
    sizes = [node_of.count(node) for node in sorted(set(node_of))]
    experts = [num_experts * size // ranks for size in sizes]
    reached = [1 - comb(num_experts - there, topk) / comb(num_experts, topk) for there in experts]
    plain = sum(size / ranks * topk * (num_experts - there) / num_experts
                for size, there in zip(sizes, experts, strict=True))  # fmt: skip
    once = sum(size / ranks * (sum(reached) - own) for size, own in zip(sizes, reached, strict=True))
    return plain, once


def dispatcher_for(setting: str, node_of: tuple[int, ...], topk: int, num_experts: int) -> Choice:
    """The dispatcher that a value of --xmoe-dispatcher means for a group: rbd only where there is something to bypass.

    Args: the value, and those of `network_rows`.
    """
    choice = choose_dispatcher(node_of, topk, num_experts)
    if setting == "auto":
        return Choice(choice.dispatcher, f"auto: {choice.reason}")
    nothing_to_bypass = len(set(node_of)) in (1, len(node_of))
    if setting == "rbd" and nothing_to_bypass:
        return Choice("alltoall", f"--xmoe-dispatcher rbd has nothing to bypass: {choice.reason}")
    return Choice(setting, f"--xmoe-dispatcher {setting}")


def choose_dispatcher(node_of: tuple[int, ...], topk: int, num_experts: int) -> Choice:
    """Redundancy-bypassing dispatch if it saves enough of the network's rows, the plain all-to-all otherwise.

    Args: those of `network_rows`.
    """
    sizes = [node_of.count(node) for node in sorted(set(node_of))]
    where = f"{len(node_of)} expert-parallel rank{'s' * (len(node_of) > 1)} on {_nodes(sizes)}"
    if len(sizes) == 1:
        return Choice("alltoall", f"{where}, so nothing crosses the network")
    if max(sizes) == 1:
        return Choice("alltoall", f"{where}, so no node could pass a row on")
    plain, once = network_rows(node_of, topk, num_experts)
    saving = 1 - once / plain
    numbers = f"a token sends {once:.2f} rows over the network instead of {plain:.2f} ({saving:.1%} fewer) with " \
        f"top-{topk} of {num_experts} experts"  # fmt: skip
    if saving < LEAST_SAVING:
        return Choice("alltoall", f"{where}: with rbd {numbers}, and {LEAST_SAVING:.0%} would be worth it")
    return Choice("rbd", f"{where}: {numbers}")


def _nodes(sizes: list[int]) -> str:
    if len(sizes) == 1:
        return "one node"
    if len(set(sizes)) == 1:
        return f"{len(sizes)} nodes of {sizes[0]}"
    return f"{len(sizes)} nodes of {', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"
