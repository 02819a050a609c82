"""The same weights and data give the same losses and the same updates, whatever backend and layout."""

import pytest
import torch
from jobs import TOY, relative_difference, run_job, saved_tensors, start_from

XMOE = "--moe-backend xmoe"
LAYOUTS = {
    "one process": (1, ""),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "EP3": (3, "--expert-model-parallel-size 3"),
    "EP4": (4, "--expert-model-parallel-size 4"),
    "TP2 with sequence parallelism x EP4": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4",
    ),
    "TP2 with sequence parallelism": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2 x EP2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
    "PP3": (3, "--pipeline-model-parallel-size 3"),
    "interleaved PP2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3"),
    "full recomputation": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}
# with --slow only: what another layout, or the other comparison of the same layout, shows in every run
SLOW_LOSSES = ("EP3", "EP4", "TP2 with sequence parallelism", "TP2 with sequence parallelism x EP4")
SLOW_UPDATES = ("EP3", "PP3", "interleaved PP2", "full recomputation")
LOSS_TOLERANCE = 1e-5  # relative, each of 20 iterations
UPDATE_TOLERANCE = 1e-4  # relative RMS of a tensor's update after one plain SGD step
SGD = "--optimizer sgd --sgd-momentum 0 --clip-grad 0 --weight-decay 0 --lr 1 --train-iters 1".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of stock Megatron in one process; initialisation depends on the layout, so all start from it."""
    directory = tmp_path_factory.mktemp("weights")
    run_job(TOY, "--train-iters", "1", "--save", str(directory), "--save-interval", "1", "--ckpt-format", "torch_dist")
    return directory


@pytest.fixture(scope="module")
def stock(weights):
    """Stock Megatron's losses in one process."""
    return run_job(TOY, "--train-iters", "20", start_from(weights))


def updates(weights, directory, *options, processes=1):
    """Each tensor's change by one SGD step."""
    saving = ["--save", str(directory), "--save-interval", "1", "--no-save-optim"]
    run_job(TOY, SGD, start_from(weights), saving, *options, processes=processes)
    before, after = saved_tensors(weights, 1), saved_tensors(directory, 1)
    names = {name for name in after if "optimizer" not in name and "rng" not in name}
    assert len(names) > 40 and names <= before.keys()
    return {name: (after[name] - before[name]).double() for name in names if after[name].is_floating_point()}


@pytest.fixture(scope="module")
def stock_updates(weights, tmp_path_factory):
    """Stock Megatron's updates in one process."""
    return updates(weights, tmp_path_factory.mktemp("stock"))


def layouts(slow):
    """All layouts, those named `slow` with that mark."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in LAYOUTS]


@pytest.mark.parametrize("layout", layouts(SLOW_LOSSES))
def test_losses_equal_stock_megatron(layout, weights, stock):
    processes, options = LAYOUTS[layout]
    job = run_job(TOY, "--train-iters", "20", start_from(weights), XMOE.split(), options.split(), processes=processes)
    assert len(stock.losses) == 20
    assert relative_difference(job, stock) < LOSS_TOLERANCE


def test_losses_with_the_distributed_optimizer(weights, stock):
    processes, options = LAYOUTS["PP2 x EP2"]
    options += " --use-distributed-optimizer"
    job = run_job(TOY, "--train-iters", "20", start_from(weights), XMOE.split(), options.split(), processes=processes)
    assert relative_difference(job, stock) < LOSS_TOLERANCE


@pytest.mark.parametrize("layout", layouts(SLOW_UPDATES))
def test_updates_equal_stock_megatron(layout, weights, stock_updates, tmp_path):
    """Adam hides gradients that are wrong by a constant factor; plain SGD does not."""
    processes, options = LAYOUTS[layout]
    changed = updates(weights, tmp_path, XMOE.split(), options.split(), processes=processes)
    assert changed.keys() == stock_updates.keys()
    differences = {}
    for name, expected in stock_updates.items():
        scale = expected.pow(2).mean().sqrt()
        assert scale > 0, f"{name} was not updated at all"
        differences[name] = ((changed[name] - expected).pow(2).mean().sqrt() / scale).item()
    worst = max(differences, key=differences.get)
    assert differences[worst] < UPDATE_TOLERANCE, f"{worst}: {differences[worst]}"


@pytest.mark.parametrize(
    "experts, topk, options",
    [(1, 1, "--moe-router-pre-softmax"), (4, 4, "")],
    ids=["one expert", "K = E"],
)
def test_extreme_numbers_of_experts(experts, topk, options, tmp_path):
    options = f"--num-experts {experts} --moe-router-topk {topk} --train-iters 5 {options}".split()
    run_job(TOY, options, "--train-iters", "1", "--save", str(tmp_path), "--save-interval", "1")
    expected = run_job(TOY, options, start_from(tmp_path))
    processes = min(experts, 2)
    job = run_job(
        TOY, options, start_from(tmp_path), XMOE.split(), f"--expert-model-parallel-size={processes}",
        processes=processes,
    )  # fmt: skip
    assert len(expected.losses) == 5
    assert relative_difference(job, expected) < LOSS_TOLERANCE


def test_saved_tensors_are_read_whole(weights):
    """Guards the comparison above: names and shapes are those of the model, not of a rank."""
    tensors = saved_tensors(weights, 1)
    experts = next(tensor for name, tensor in tensors.items() if "layers.1.mlp.experts" in name and "fc1" in name)
    assert experts.shape[0] == 12 and torch.isfinite(experts).all()
