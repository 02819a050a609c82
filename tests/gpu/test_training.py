"""pretrain_xmoe.py on one and two GPUs: parity with stock Megatron in fp32 and bf16, and an exact resume."""

import pytest
import torch
from jobs import TOY, relative_difference, run_job, saved_tensors, start_from

pytestmark = pytest.mark.multi_gpu
XMOE = "--moe-backend xmoe".split()
EP2 = "--expert-model-parallel-size 2".split()
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2".split()
PP2 = "--pipeline-model-parallel-size 2 --use-distributed-optimizer".split()
# an iteration of the toy is too short for GPU atomics to matter, but TF32 and bf16 round differently per layout
FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 2e-2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    run_job(TOY, "--train-iters", "1", "--save", str(directory), "--save-interval", "1", "--ckpt-format", "torch_dist")
    return directory


@pytest.fixture(scope="module", params=[("", FP32_TOLERANCE), ("--bf16", BF16_TOLERANCE)], ids=["fp32", "bf16"])
def stock(request, weights):
    """Options, stock Megatron's run on one GPU, and what may differ."""
    precision, tolerance = request.param
    options = [*TOY, "--train-iters", "10", *start_from(weights), *precision.split()]
    return options, run_job(options), tolerance


SHARDED = "--tensor-model-parallel-size 2 --expert-model-parallel-size 2".split()
LAYOUTS = {
    "EP2": EP2,
    "TP2 x EP2": TP2,
    "PP2": PP2,
    "TP2 x EP2, sequence sharded in the block": SHARDED,
    "the same, whole shared experts": [*SHARDED, "--xmoe-shared-expert", "sequence"],
    "TP2 x EP2, duplicated": [*SHARDED, "--xmoe-sequence-shard", "off"],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_equal_stock_megatron_on_one_gpu(layout, stock):
    options, expected, tolerance = stock
    xmoe = run_job(options, XMOE, layout, processes=2)
    assert len(expected.losses) == 10
    assert relative_difference(xmoe, expected) < tolerance


def test_resume_is_exact(tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    schedule = "--train-iters 20 --lr-decay-iters 20 --save-interval 10 --ckpt-format torch_dist --bf16".split()
    options = [*TOY, *schedule, *XMOE, *EP2, "--use-distributed-optimizer"]
    in_one_go = run_job(options, "--save", str(whole), processes=2)
    run_job(options, "--save", str(half), "--exit-interval", "10", processes=2)
    resumed = run_job(options, "--save", str(half), "--load", str(half), processes=2)
    assert all(resumed.grad_norms[i] == in_one_go.grad_norms[i] for i in range(11, 21))
    expected, tensors = saved_tensors(whole, 20), saved_tensors(half, 20)
    different = [name for name, tensor in expected.items() if not torch.equal(tensors[name], tensor)]
    assert len(expected) > 100 and not different
