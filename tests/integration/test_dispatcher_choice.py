"""Which dispatcher a run takes by itself, and what the start-up block says about it."""

import re

from jobs import TOY, relative_difference, run_job

RUN = [*TOY, *"--moe-backend xmoe --train-iters 2 --lr-decay-iters 2 --xmoe-dispatcher auto".split()]


def told(job) -> list[str]:
    """The lines about dispatchers of the start-up block."""
    return [line.strip() for line in job.output.splitlines() if line.strip().startswith("dispatcher ")]


def test_auto_takes_rbd_between_nodes():
    """Top-3 of 12 experts on two nodes: 1 - C(6, 3) / C(12, 3) = 0.91 rows to the other node instead of 1.5."""
    ep4 = "--expert-model-parallel-size 4".split()
    over_nodes = run_job(RUN, ep4, "--xmoe-ranks-per-node", "2", processes=4)
    assert told(over_nodes) == [
        "dispatcher   rbd: one row per token and node between nodes, no padding (auto: 4 expert-parallel ranks on 2 "
        "nodes of 2: a token sends 0.91 rows over the network instead of 1.50 (39.4% fewer) with top-3 of 12 experts; "
        "nodes by --xmoe-ranks-per-node 2)"
    ]
    on_one = run_job(RUN, ep4, processes=4)
    assert told(on_one) == [
        "dispatcher   alltoall: one uneven all-to-all of routed rows, no padding (auto: 4 expert-parallel ranks on one "
        "node, so nothing crosses the network; nodes by host names)"
    ]
    assert relative_difference(over_nodes, on_one) < 1e-5
    shown = re.findall(
        r"inter-node: [0-9.]+ MiB, [0-9.]+ saved \(([0-9.]+)% of the rows\) \| intra-node: [0-9.]+ MiB \|",
        over_nodes.output,
    )
    assert len(shown) == 2 and all(36 < float(share) < 43 for share in shown)
    assert "inter-node:" not in on_one.output


def test_groups_that_lie_differently():
    """Ranks 0 and 1 are on nodes of their own, 2 and 3 share one."""
    job = run_job(RUN, "--expert-model-parallel-size 2 --xmoe-ranks-per-node 1,1,2".split(), processes=4)
    first, second = told(job)
    assert first.startswith("dispatcher   on 2 processes alltoall") and "2 nodes of 1, so no node could" in first
    assert second.startswith("dispatcher   on 2 processes alltoall") and "2 expert-parallel ranks on one node" in second
    assert len(job.losses) == 2
