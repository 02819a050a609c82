"""Nodes of expert-parallel groups in layouts of many ranks, each rank by itself over a fake process group."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_xmoe import parallel_state as topology
from megatron_xmoe.parallel_state import NodeTopology, node_topology, parse_ranks_per_node
from megatron_xmoe.platform.placement import dp_first

ORDERS = {"ep-first": "tp-cp-ep-dp-pp", "dp-first": dp_first(), "tp-pp-dp": "tp-cp-ep-pp-dp"}


@contextmanager
def one_of(world_size: int, rank: int) -> Iterator[None]:
    """This process as a rank of a world in which nobody else is."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def layout_of(world_size: int, rank: int, order: str, tp=1, pp=1, cp=1, ep=1, etp=1) -> Iterator[None]:
    """Megatron's process groups of a rank."""
    from megatron.core import parallel_state

    with one_of(world_size, rank):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            order=order,
            create_gloo_process_groups=False,  # these would look for the other ranks
        )
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    ("text", "world_size", "sizes"),
    [
        ("8", 16, [8, 8]),
        ("8", 8, [8]),
        ("3,5", 8, [3, 5]),
        ("3, 5", 16, [3, 5, 3, 5]),
        ("1", 3, [1, 1, 1]),
        ("4,2,2", 8, [4, 2, 2]),
    ],
)
def test_sizes_of_nodes(text, world_size, sizes):
    assert parse_ranks_per_node(text, world_size) == sizes


@pytest.mark.parametrize("text", ["", "0", "-2", "two", "2,", "2,0", "1.5", "²", "2;2"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"--xmoe-ranks-per-node is '.*'; it must be .* Fix: give the") as raised:
        parse_ranks_per_node(text, 4)
    assert f"'{text}'" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "told"), [("3", "3 is a node's size"), ("3,4", "3,4 adds up to 7"), ("16", "16 is a node's size")]
)
def test_sizes_that_do_not_fill_the_world(text, told):
    with pytest.raises(ValueError, match=rf"--xmoe-ranks-per-node {told}, .* processes, 8\. Fix: give the size of"):
        parse_ranks_per_node(text, 8)


def test_what_a_rank_sees():
    seen = NodeTopology(node_of=(0, 1, 0, 1, 1, 2), rank=4, source="a test")
    assert (seen.num_nodes, seen.node, seen.local_rank, seen.node_sizes) == (3, 1, 2, (2, 3, 1))
    assert [seen.members(node) for node in range(3)] == [(0, 2), (1, 3, 4), (5,)]


# world, sizes of its nodes, and a layout
LAYOUTS = [
    (8, [8], {"ep": 8}),
    (8, [3, 5], {"ep": 8}),  # a node holds three of eight ranks
    (8, [4, 4], {"ep": 8}),
    (8, [2] * 4, {"ep": 4}),
    (8, [1] * 8, {"ep": 4}),
    (16, [8, 8], {"ep": 4, "tp": 2, "etp": 2}),  # ranks of an expert-parallel group are two apart
    (16, [4] * 4, {"ep": 4, "tp": 4, "etp": 4}),  # four apart: each on another node
    (16, [4] * 4, {"ep": 2, "tp": 2, "pp": 2}),
    (16, [4] * 4, {"ep": 4, "tp": 2, "pp": 2}),
    (16, [5, 11], {"ep": 4, "tp": 2, "etp": 2, "pp": 2}),
    (16, [6, 10], {"ep": 4, "tp": 2, "cp": 2}),
    (12, [5, 7], {"ep": 3, "pp": 2}),
    (12, [4, 4, 4], {"ep": 6, "tp": 2, "etp": 2}),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("world", "sizes", "layout"), LAYOUTS, ids=str)
def test_nodes_of_a_layout(world, sizes, layout, order):
    """Ranks are on the node that holds their global rank, and every rank of a group sees the same."""
    from megatron.core import parallel_state

    stage_between = order == "tp-pp-dp" and layout.get("pp", 1) > 1
    if stage_between and layout["ep"] * layout.get("etp", 1) != layout.get("tp", 1) * layout.get("cp", 1):
        layout = {"ep": 2, "tp": 2, "pp": 2}  # Megatron wants replicas of experts and of dense layers to be as many
    starts = [0, *accumulate(sizes)]
    seen: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for rank in range(world):
        with layout_of(world, rank, ORDERS[order], **layout):
            group = parallel_state.get_expert_model_parallel_group()
            ranks = dist.get_process_group_ranks(group)
            found = node_topology(group, ",".join(map(str, sizes)))
            node = max(n for n, start in enumerate(starts) if start <= rank)
            together = [r for r in ranks if starts[node] <= r < starts[node + 1]]
            assert [ranks[member] for member in found.members(found.node)] == together
            assert ranks[found.rank] == rank and together[found.local_rank] == rank
            assert dist.get_process_group_ranks(found.intra_group) == together
            assert (found.intra_group is group) == (found.num_nodes == 1)
            assert found.intra_group is node_topology(group, ",".join(map(str, sizes))).intra_group
            assert found.source == f"--xmoe-ranks-per-node {','.join(map(str, sizes))}"
            seen.setdefault(tuple(ranks), set()).add(found.node_of)
    assert sorted(rank for ranks in seen for rank in ranks) == list(range(world))
    for (node_of,) in seen.values():  # one view of each group
        assert list(dict.fromkeys(node_of)) == list(range(max(node_of) + 1))  # numbered as they appear


@pytest.mark.parametrize("etp", [1, 2])
@pytest.mark.parametrize("pp", [1, 2])
def test_groups_of_both_placements(pp, etp):
    """Replicas or expert-parallel ranks are neighbours; the dense layers' groups do not change."""
    from megatron.core import parallel_state

    def groups(order):
        found = []
        for rank in range(16):
            with layout_of(16, rank, order, tp=2, ep=2, pp=pp, etp=etp):
                found.append({name: dist.get_process_group_ranks(get()) for name, get in getters.items()})
        return found

    getters = {
        "ep": parallel_state.get_expert_model_parallel_group,
        "edp": parallel_state.get_expert_data_parallel_group,
        "etp": parallel_state.get_expert_tensor_parallel_group,
        "dense dp": parallel_state.get_data_parallel_group,
        "dense tp": parallel_state.get_tensor_model_parallel_group,
        "pp": parallel_state.get_pipeline_model_parallel_group,
    }
    replicas = 16 // (2 * pp * etp)
    for rank, (ep_first, replicas_first) in enumerate(zip(*map(groups, list(ORDERS.values())[:2]), strict=True)):
        start, tensor = rank // (16 // pp) * (16 // pp), rank % etp
        place = (rank - start) // etp
        assert ep_first["ep"] == [start + (place // 2 * 2 + i) * etp + tensor for i in range(2)]
        assert ep_first["edp"] == [start + (place % 2 + 2 * i) * etp + tensor for i in range(replicas)]
        assert replicas_first["ep"] == [start + (place % replicas + replicas * i) * etp + tensor for i in range(2)]
        assert replicas_first["edp"] == [
            start + (place // replicas * replicas + i) * etp + tensor for i in range(replicas)
        ]
        for name in ("etp", "dense dp", "dense tp", "pp"):
            assert ep_first[name] == replicas_first[name]


def test_placement_reaches_megatron(monkeypatch):
    """The patch turns the order that Megatron's training loop passes, or leaves out, and keeps everything else."""
    from megatron.core import parallel_state

    from megatron_xmoe.platform import placement

    calls = []
    noted = lambda *args, **kwargs: calls.append((args, kwargs))  # noqa: E731
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", noted)
    placement.install_dp_first()
    placement.install_dp_first()
    parallel_state.initialize_model_parallel(2, order="tp-cp-ep-dp-pp", use_sharp=True)
    parallel_state.initialize_model_parallel(2, order="tp-cp-ep-pp-dp")
    parallel_state.initialize_model_parallel()
    assert calls == [
        ((2,), {"order": "tp-cp-dp-ep-pp", "use_sharp": True}),
        ((2,), {"order": "tp-cp-dp-pp-ep"}),
        ((), {"order": "tp-cp-dp-ep-pp"}),
    ]
    assert dp_first("tp-gtp_remat-cp-ep-dp-pp") == "tp-gtp_remat-cp-dp-ep-pp"


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({}, (None, None)),
        ({"GROUP_RANK": "3"}, (None, None)),
        ({"GROUP_RANK": "3", "TORCHELASTIC_RUN_ID": "1"}, ("torchrun's GROUP_RANK", "3")),
        ({"SLURM_NODEID": "2", "SLURM_PROCID": "17", "RANK": "17"}, ("srun's SLURM_NODEID", "2")),
        ({"SLURM_NODEID": "0", "SLURM_PROCID": "0", "RANK": "17"}, (None, None)),  # inherited from the batch script
        ({"SLURM_NODEID": "0", "SLURM_PROCID": "0"}, (None, None)),
        (
            {"SLURM_NODEID": "2", "SLURM_PROCID": "2", "RANK": "2", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "1"},
            ("torchrun's GROUP_RANK", "1"),
        ),
    ],
)
def test_launchers_variables(monkeypatch, environment, word):
    for name in ("RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NODEID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert topology._launchers_word() == word


def test_nobody_to_ask():
    with one_of(4, 1):
        alone = node_topology(dist.new_group([1]))
        assert (alone.node_of, alone.rank, alone.source) == ((0,), 0, "a single rank")
        found = node_topology(dist.group.WORLD)
        assert found.node_of == (0, 0, 0, 0)
        assert found.source == "nobody to ask behind a fake process group; --xmoe-ranks-per-node N would say"
