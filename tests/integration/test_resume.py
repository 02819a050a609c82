"""A run in two parts is the run in one, bit for bit; checkpoints move between layouts and backends."""

import pytest
import torch
from jobs import TOY, relative_difference, run_job, saved_tensors, start_from

XMOE = "--moe-backend xmoe".split()
EP2 = "--expert-model-parallel-size 2".split()
SCHEDULE = "--train-iters 20 --lr-decay-iters 20 --save-interval 10 --ckpt-format torch_dist".split()
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1".split()  # so that random states matter


def saving(directory):
    return ["--save", str(directory)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("", id="plain", marks=pytest.mark.slow),
        pytest.param("--use-distributed-optimizer", id="distributed optimizer"),
    ],
)
def runs(request, tmp_path_factory):
    """20 iterations in one go, and the first 10 of the same run stopped by a checkpoint."""
    options = [*TOY, *DROPOUT, *SCHEDULE, *XMOE, *EP2, *request.param.split()]
    whole, half = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("half")
    in_one_go = run_job(options, saving(whole), processes=2)
    run_job(options, saving(half), "--exit-interval", "10", processes=2)
    return options, in_one_go, whole, half


def test_resume_is_exact(runs):
    options, in_one_go, whole, half = runs
    resumed = run_job(options, saving(half), "--load", str(half), processes=2)
    assert list(resumed.losses) == list(range(11, 21))
    # Megatron's console shows the mean of the first two losses at the second iteration after a resume
    for i in set(resumed.losses) - {12}:
        assert resumed.losses[i] == in_one_go.losses[i]
    assert all(resumed.grad_norms[i] == in_one_go.grad_norms[i] for i in resumed.grad_norms)
    expected, tensors = saved_tensors(whole, 20), saved_tensors(half, 20)
    assert len(expected) > 100 and tensors.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensors[name], tensor)]
    assert not different


def test_resume_with_more_expert_parallelism(runs, tmp_path):
    """A checkpoint of EP2 goes on at EP4, optimizer states included; without dropout the losses stay the same."""
    options, _, whole, half = runs
    still = [*options, "--attention-dropout", "0", "--hidden-dropout", "0", "--load", str(half), "--ckpt-step", "10"]
    expected = run_job(still, processes=2)
    wider = run_job(still, "--expert-model-parallel-size", "4", processes=4)
    assert len(expected.losses) == 10
    assert relative_difference(wider, expected) < 1e-5


def test_weights_of_a_parallel_run_in_one_process(runs):
    """Optimizer states do not move between EP = 1 and EP > 1 (Megatron's rule); weights do."""
    _, _, whole, _ = runs
    expected = run_job(TOY, XMOE, EP2, "--train-iters", "3", start_from(whole), processes=2)
    alone = run_job(TOY, XMOE, "--train-iters", "3", start_from(whole))
    assert len(expected.losses) == 3
    assert relative_difference(alone, expected) < 1e-5


def test_xmoe_checkpoint_loads_into_stock_megatron(runs):
    _, _, whole, _ = runs
    xmoe = run_job(TOY, XMOE, EP2, "--train-iters", "3", start_from(whole), processes=2)
    stock = run_job(TOY, EP2, "--train-iters", "3", start_from(whole), processes=2)
    assert len(stock.losses) == 3
    assert relative_difference(xmoe, stock) < 1e-5
