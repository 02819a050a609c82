"""pretrain_xmoe.py with redundancy bypassing trains as with the plain dispatcher, from the same weights."""

import pytest
import torch
from jobs import TOY, relative_difference, run_job, saved_tensors, start_from

EP4 = "--moe-backend xmoe --expert-model-parallel-size 4 --xmoe-ranks-per-node 2"
LAYOUTS = {
    "EP4": (4, EP4),
    "EP4, recomputed": (
        4, f"{EP4} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
    "EP4 of TP2 with sequence parallelism": (4, f"{EP4} --tensor-model-parallel-size 2 --sequence-parallel"),
    "EP4, recomputed experts, overlapped shared experts, guard": (
        4,
        f"{EP4} --recompute-granularity selective --recompute-modules moe --moe-shared-expert-overlap "
        "--xmoe-guard-empty-alltoall on",
    ),
    "PP2 x EP4": (8, f"{EP4} --pipeline-model-parallel-size 2"),
}  # fmt: skip
FIRST_PILOT = {"EP4, recomputed experts, overlapped shared experts, guard"}  # the others spread them
FAST = ("EP4",)
IN_TURN = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in LAYOUTS]
SGD = "--optimizer sgd --sgd-momentum 0 --clip-grad 0 --weight-decay 0 --lr 1 --train-iters 1".split()
LOSS_TOLERANCE = 1e-5  # relative, each of 20 iterations
UPDATE_TOLERANCE = 1e-5  # relative RMS of a tensor's update


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of one process."""
    directory = tmp_path_factory.mktemp("weights")
    run_job(TOY, "--train-iters", "1", "--save", str(directory), "--save-interval", "1", "--ckpt-format", "torch_dist")
    return directory


def dispatcher_of(layout: str, name: str) -> list[str]:
    """Options that choose a dispatcher; those of rbd are refused beside alltoall."""
    first = ["--xmoe-pilot", "first"] if name == "rbd" and layout in FIRST_PILOT else []
    return ["--xmoe-dispatcher", name, *first]


@pytest.mark.parametrize("layout", IN_TURN)
def test_losses(layout, weights):
    processes, options = LAYOUTS[layout]
    jobs = {
        name: run_job(TOY, "--train-iters", "20", start_from(weights), options.split(), dispatcher_of(layout, name),
                      processes=processes)
        for name in ("alltoall", "rbd")
    }  # fmt: skip
    assert "dispatcher   rbd: " in jobs["rbd"].output and "dispatcher   alltoall: " in jobs["alltoall"].output
    assert len(jobs["alltoall"].losses) == 20
    assert relative_difference(jobs["rbd"], jobs["alltoall"]) < LOSS_TOLERANCE


@pytest.mark.parametrize("layout", IN_TURN)
def test_updates(layout, weights, tmp_path):
    """Every parameter's change by one step of plain SGD, which hides no wrong factor."""
    processes, options = LAYOUTS[layout]
    before, after = saved_tensors(weights, 1), {}
    for name in ("alltoall", "rbd"):
        saving = ["--save", str(tmp_path / name), "--save-interval", "1", "--no-save-optim"]
        chosen = options.split() + dispatcher_of(layout, name)
        run_job(TOY, SGD, start_from(weights), saving, chosen, processes=processes)
        after[name] = saved_tensors(tmp_path / name, 1)
    names = [name for name, tensor in after["rbd"].items() if "rng" not in name and tensor.is_floating_point()]
    assert len(names) > 40
    differences = {}
    for name in names:
        plain, rbd = ((after[kind][name] - before[name]).double() for kind in ("alltoall", "rbd"))
        scale = plain.pow(2).mean().sqrt()
        assert scale > 0, f"{name} was not updated at all"
        differences[name] = ((rbd - plain).pow(2).mean().sqrt() / scale).item()
    worst = max(differences, key=differences.get)
    assert differences[worst] < UPDATE_TOLERANCE, f"{worst}: {differences[worst]}"


def test_nothing_to_bypass_is_said(weights):
    """On a single node the plain dispatcher runs, whatever was asked for, and the start-up block says so."""
    options = "--moe-backend xmoe --expert-model-parallel-size 2 --xmoe-ranks-per-node 2 --xmoe-dispatcher rbd"
    job = run_job(TOY, "--train-iters", "1", start_from(weights), options.split(), processes=2)
    (line,) = (line for line in job.output.splitlines() if line.startswith("dispatcher "))
    assert "alltoall" in line and "--xmoe-dispatcher rbd has nothing to bypass" in line and "one node" in line
    assert torch.isfinite(torch.tensor(list(job.losses.values()))).all()
