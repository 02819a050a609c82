"""Which ranks of an expert-parallel group share a node, and the process group of one node's ranks.

A node is a set of ranks joined by links much faster than those to other ranks: a host with its GPUs, as a rule. Nothing
is concluded from rank numbers: what counts is the global ranks of the group and where their processes run.

There is no group across nodes. Redundancy-bypassing dispatch exchanges between nodes on the expert-parallel group
itself, sending nothing to the own node, because a pilot may go to any rank of another node.
"""

import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

OPTION = "--xmoe-ranks-per-node"


@dataclass(frozen=True)
class NodeTopology:
    """The nodes of an expert-parallel group of G ranks, as one of its ranks sees them (paper, section 4.2)."""

    node_of: tuple[int, ...]
    """[G] node of each rank of the group, numbered from 0 by first appearance."""

    rank: int
    """This process's rank in the group."""

    source: str
    """Where the knowledge comes from, in words."""

    ep_group: ProcessGroup | None = field(default=None, repr=False, compare=False)
    """The group; None where no communication is meant."""

    @property
    def num_nodes(self) -> int:
        """Nodes that hold ranks of the group."""
        return max(self.node_of) + 1

    @property
    def node(self) -> int:
        """This rank's node."""
        return self.node_of[self.rank]

    @property
    def local_rank(self) -> int:
        """This rank's place among the members of its node, and its rank in `intra_group`."""
        return self.members(self.node).index(self.rank)

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """Number of the group's ranks on each node."""
        return tuple(self.node_of.count(node) for node in range(self.num_nodes))

    def members(self, node: int) -> tuple[int, ...]:
        """The group's ranks on a node, ascending, as ranks in the group."""
        return tuple(rank for rank, there in enumerate(self.node_of) if there == node)

    @property
    def intra_group(self) -> ProcessGroup:
        """Process group of this node's members, in ascending order.

        Made when it is first asked for; all ranks of the expert-parallel group have to ask then. With a single node it
        is the expert-parallel group itself.
        """
        if self.num_nodes == 1:
            return self.ep_group
        groups = _known(self.ep_group).intra_groups
        if self.node_of not in groups:
            groups[self.node_of] = self._make_intra_group()
        return groups[self.node_of]

    def _make_intra_group(self) -> ProcessGroup:
        """Only the members take part: a plain new_group waits for the world, where not every rank has such layers.

        torch then derives the group's name from its ranks and from how many groups this process has. So every rank of
        the expert-parallel group makes exactly one group for a topology, alone on its node or not. NCCL would split the
        world's communicator, and wait for all its ranks again, if a device had been bound to the world
        (init_process_group's device_id); Megatron binds none.
        """
        global_ranks = dist.get_process_group_ranks(self.ep_group)
        return dist.new_group(
            [global_ranks[rank] for rank in self.members(self.node)],
            timeout=_timeout(self.ep_group),
            backend=dist.get_backend(self.ep_group),
            use_local_synchronization=True,
            group_desc="XMOE_INTRA_NODE_GROUP",
        )


@dataclass
class _Known:
    """What has been found out and built for an expert-parallel group."""

    nodes: dict[str | None, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    """Value of the option -> `node_of` and its source."""

    intra_groups: dict[tuple[int, ...], ProcessGroup] = field(default_factory=dict)
    """`node_of` -> group of this rank's node."""


# It ends with the group: a layout that is initialised anew has other groups, and nothing has to be forgotten by hand.
_OF_GROUP: WeakKeyDictionary[ProcessGroup, _Known] = WeakKeyDictionary()


def _known(group: ProcessGroup) -> _Known:
    return _OF_GROUP.setdefault(group, _Known())


def node_topology(ep_group: ProcessGroup, ranks_per_node: str | int | None = None) -> NodeTopology:
    """The nodes of an expert-parallel group; a collective of the group unless `ranks_per_node` says it all.

    Args:
        ep_group: any group of the world's ranks, contiguous or not.
        ranks_per_node: of --xmoe-ranks-per-node; None asks the launcher's variables, and where these do not say, the
            hosts' names.

    Raises:
        ValueError: `ranks_per_node` does not describe the world.
    """
    known = _known(ep_group)
    setting = None if ranks_per_node is None else str(ranks_per_node)
    if setting not in known.nodes:
        known.nodes[setting] = _detect(ep_group) if setting is None else _told(ep_group, setting)
    node_of, source = known.nodes[setting]
    return NodeTopology(node_of, dist.get_rank(ep_group), source, ep_group)


def parse_ranks_per_node(text: str, world_size: int) -> list[int]:
    """The sizes of all nodes, in order of the global ranks, from the value of --xmoe-ranks-per-node.

    Args:
        text: a size, or sizes of consecutive nodes separated by commas; repeated until the world is complete.
        world_size: number of processes.

    Raises:
        ValueError: value, rule and fix.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"{OPTION} is '{text}'; it must be a positive number, or several separated by commas. Fix: give the number "
            "of processes of a node, like 8, or of each node, like 3,5"
        )
    sizes = [int(part) for part in parts]
    if world_size % sum(sizes):
        what = f"adds up to {sum(sizes)}" if len(sizes) > 1 else "is a node's size"
        raise ValueError(
            f"{OPTION} {text} {what}, and does not divide the number of processes, {world_size}. Fix: give the size of "
            "every node, separated by commas"
        )
    return sizes * (world_size // sum(sizes))


def _told(group: ProcessGroup, setting: str) -> tuple[tuple[int, ...], str]:
    ends = list(accumulate(parse_ranks_per_node(setting, dist.get_world_size())))
    nodes = [sum(rank >= end for end in ends) for rank in dist.get_process_group_ranks(group)]
    return _by_appearance(nodes), f"{OPTION} {setting}"


def _detect(group: ProcessGroup) -> tuple[tuple[int, ...], str]:
    """Ask every rank of the group where it runs."""
    size = dist.get_world_size(group)
    if size == 1:
        return (0,), "a single rank"
    if dist.get_backend(group) == "fake":
        return (0,) * size, f"nobody to ask behind a fake process group; {OPTION} N would say"
    places: list = [None] * size
    dist.all_gather_object(places, (*_launchers_word(), socket.gethostname()), group=group)
    launchers, nodes, hosts = zip(*places, strict=True)
    if None not in launchers and len(set(launchers)) == 1:
        return _by_appearance(nodes), launchers[0]
    return _by_appearance(hosts), "host names"


def _launchers_word() -> tuple[str | None, str | None]:
    """Which variable of the launcher names this process's node, and the name; (None, None) where none does."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment and "GROUP_RANK" in environment:
        return "torchrun's GROUP_RANK", environment["GROUP_RANK"]
    # a shell in an allocation hands its own SLURM_NODEID down to whatever it starts: only srun's tasks have their rank
    started_by_srun = "RANK" in environment and environment.get("SLURM_PROCID") == environment["RANK"]
    if "SLURM_NODEID" in environment and started_by_srun:
        return "srun's SLURM_NODEID", environment["SLURM_NODEID"]
    return None, None


def _by_appearance(nodes: list | tuple) -> tuple[int, ...]:
    """Any names of nodes, one a rank, turned into numbers from 0 in the order in which they come."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(nodes))}
    return tuple(numbers[name] for name in nodes)


def _timeout(group: ProcessGroup) -> timedelta | None:
    """How long the group's collectives may take: of --distributed-timeout-minutes, which new_group does not know."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)
