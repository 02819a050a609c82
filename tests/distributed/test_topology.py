"""Nodes found and groups built by four processes, which reach each other in them; layout after layout."""

import os
from dataclasses import dataclass
from datetime import timedelta

import harness
import pytest
import torch
import torch.distributed as dist

WORLD = 4
LAUNCHER = ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "SLURM_NODEID", "SLURM_PROCID")


@dataclass(frozen=True)
class Case:
    """A layout, and what tells each rank's node."""

    layout: tuple[int, ...]
    """Tensor, expert, pipeline and expert-tensor parallel size."""

    option: str | None = None
    torchrun: tuple[str, ...] | None = None
    """GROUP_RANK of each rank."""

    srun: tuple[str, ...] | None = None
    """SLURM_NODEID of each rank; '' for one that srun did not start."""

    hosts: tuple[str, ...] | None = None
    only_stage: int | None = None
    """The pipeline stage whose ranks have layers with experts; others never ask."""

    expected: tuple[tuple[int, ...] | None, ...] = ()
    """Global ranks on the node of each rank, of those in its expert-parallel group; None for ranks that do not ask."""

    source: str = ""


PAIRS = ((0, 1), (0, 1), (2, 3), (2, 3))
CROSS = ((0, 2), (1, 3), (0, 2), (1, 3))
ALONE = ((0,), (1,), (2,), (3,))
TOGETHER = ((0, 1, 2, 3),) * 4
ONE_AND_THREE = ((0,), (1, 2, 3), (1, 2, 3), (1, 2, 3))
CASES = [
    Case((1, 4, 1, 1), "2", expected=PAIRS, source="--xmoe-ranks-per-node 2"),
    Case((1, 4, 1, 1), "1,3", expected=ONE_AND_THREE, source="--xmoe-ranks-per-node 1,3"),
    Case((1, 4, 1, 1), "4", expected=TOGETHER, source="--xmoe-ranks-per-node 4"),
    Case((1, 4, 1, 1), "1", torchrun=("0", "0", "1", "1"), expected=ALONE, source="--xmoe-ranks-per-node 1"),
    Case((1, 4, 1, 1), torchrun=("0", "0", "1", "1"), expected=PAIRS, source="torchrun's GROUP_RANK"),
    Case((1, 4, 1, 1), torchrun=("7", "5", "7", "5"), expected=CROSS, source="torchrun's GROUP_RANK"),
    Case((1, 4, 1, 1), srun=("1", "0", "0", "0"), expected=ONE_AND_THREE, source="srun's SLURM_NODEID"),
    Case((1, 4, 1, 1), srun=("0", "", "1", "1"), hosts=("a", "b", "a", "b"), expected=CROSS, source="host names"),
    Case((1, 4, 1, 1), hosts=("x", "y", "y", "y"), expected=ONE_AND_THREE, source="host names"),
    Case((1, 4, 1, 1), expected=TOGETHER, source="host names"),
    Case((2, 2, 1, 2), "2", expected=ALONE, source="--xmoe-ranks-per-node 2"),  # groups (0, 2) and (1, 3)
    Case((2, 2, 1, 2), "4", expected=CROSS, source="--xmoe-ranks-per-node 4"),
    Case((2, 2, 1, 2), hosts=("a", "a", "a", "b"), expected=((0, 2), (1,), (0, 2), (3,)), source="host names"),
    Case((1, 2, 2, 1), "1", only_stage=1, expected=(None, None, (2,), (3,)), source="--xmoe-ranks-per-node 1"),
    Case((1, 2, 2, 1), hosts=(*"aaab",), only_stage=1, expected=(None, None, (2,), (3,)), source="host names"),
    Case((1, 2, 2, 1), "3,1", expected=((0, 1), (0, 1), (2,), (3,)), source="--xmoe-ranks-per-node 3,1"),
    Case((1, 4, 1, 1), "2", expected=PAIRS, source="--xmoe-ranks-per-node 2"),  # once more, after other layouts
    Case((1, 4, 1, 1), "1,3", expected=ONE_AND_THREE, source="--xmoe-ranks-per-node 1,3"),
]


def run_all() -> tuple[list[dict | None], float]:
    """Every case in a layout of its own: what this rank sees; and the timeout of a group that follows from another."""
    return [run(case) for case in CASES], timeout_of_a_nodes_group()


def run(case: Case) -> dict | None:
    """What this rank sees in a case."""
    from megatron.core import parallel_state

    tp, ep, pp, etp = case.layout
    with harness.model_parallel(tp=tp, ep=ep, pp=pp, etp=etp):
        if case.only_stage in (None, parallel_state.get_pipeline_model_parallel_rank()):
            return look(case, parallel_state.get_expert_model_parallel_group())
        return None


def look(case: Case, group: dist.ProcessGroup) -> dict:
    """The topology of this rank's group, asked for twice, as two layers do."""
    from unittest import mock

    from megatron_xmoe.parallel_state import node_topology

    rank = dist.get_rank()
    environment = {"TORCHELASTIC_RUN_ID": "job", "GROUP_RANK": case.torchrun[rank]} if case.torchrun else {}
    if case.srun and case.srun[rank]:
        environment |= {"SLURM_NODEID": case.srun[rank], "SLURM_PROCID": str(rank)}
    cleared = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    with (
        mock.patch.dict(os.environ, cleared | environment, clear=True),
        mock.patch("socket.gethostname", lambda: case.hosts[rank] if case.hosts else "here"),
    ):
        found = node_topology(group, case.option)
    with mock.patch.object(dist, "all_gather_object", None):  # nobody is asked again
        again = node_topology(group, case.option)
    total = torch.tensor([rank])
    dist.all_reduce(total, group=found.intra_group)
    return {
        "members": tuple(dist.get_process_group_ranks(group)[member] for member in found.members(found.node)),
        "intra": tuple(dist.get_process_group_ranks(found.intra_group)),
        "local": (found.local_rank, dist.get_rank(found.intra_group)),
        "sum": total.item(),
        "source": found.source,
        "same": again == found and again.intra_group is found.intra_group,
    }


def timeout_of_a_nodes_group() -> float:
    """Seconds after which a collective inside a node gives up, where those of the whole group have 77."""
    from megatron_xmoe.parallel_state import node_topology

    group = dist.new_group(timeout=timedelta(seconds=77))
    intra = node_topology(group, "2").intra_group
    return intra._get_backend(torch.device("cpu")).options._timeout.total_seconds()


@pytest.fixture(scope="module")
def ranks() -> list[tuple[list[dict | None], float]]:
    """What each rank saw, by case; and a timeout."""
    return harness.run_distributed(run_all, WORLD, timeout=300)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index].expected))
def test_nodes_and_their_groups(ranks, index):
    case = CASES[index]
    for rank, expected in enumerate(case.expected):
        seen = ranks[rank][0][index]
        if expected is None:
            assert seen is None
            continue
        assert seen["members"] == seen["intra"] == expected
        assert seen["local"] == (expected.index(rank),) * 2
        assert seen["sum"] == sum(expected)
        assert seen["source"] == case.source
        assert seen["same"]


def test_collectives_inside_a_node_have_the_groups_timeout(ranks):
    assert [timeout for _, timeout in ranks] == [77] * WORLD
