"""Training with what only our experts have: biases, and parameters that Megatron gathers while they are asked for."""

import pytest
from jobs import TOY, relative_difference, run_job, saved_tensors, start_from

XMOE = "--moe-backend xmoe".split()
LOSS_TOLERANCE = 1e-5  # relative, each of the iterations
# Megatron's shared experts have no biases
WITH_BIASES = [part for part in TOY if part != "--disable-bias-linear"]
at = WITH_BIASES.index("--moe-shared-expert-intermediate-size")
WITH_BIASES = WITH_BIASES[:at] + WITH_BIASES[at + 2 :]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A checkpoint with biases that are no longer the zeros they start as."""
    directory = tmp_path_factory.mktemp("biased")
    job = run_job(WITH_BIASES, XMOE, "--train-iters", "8", "--lr", "1e-2", "--save", str(directory),
                  "--save-interval", "8")  # fmt: skip
    assert "; with biases" in job.output and "--disable-bias-linear" not in job.output
    return directory


@pytest.fixture(scope="module")
def alone(biased):
    """Losses of one process."""
    return run_job(WITH_BIASES, XMOE, "--train-iters", "8", start_from(biased))


def test_biases_are_trained(biased):
    tensors = saved_tensors(biased, 8)
    biases = {n: t for n, t in tensors.items() if ".mlp.experts" in n and n.endswith("bias") and "optimizer" not in n}
    assert len(biases) == 2 * 4  # of four layers
    for name, bias in biases.items():
        assert bias.shape == (12, 32) and bias.any(dim=1).sum() > 6, name


@pytest.mark.parametrize(
    "layout",
    [
        "--expert-model-parallel-size 2",
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2",
        "--xmoe-recompute-activation --recompute-granularity selective --recompute-modules moe",
    ],
)
def test_biases_in_every_layout(biased, alone, layout):
    processes = 1 if "parallel" not in layout else 2
    job = run_job(WITH_BIASES, XMOE, "--train-iters", "8", start_from(biased), layout.split(), processes=processes)
    assert len(alone.losses) == 8
    assert relative_difference(job, alone) < LOSS_TOLERANCE


def test_gathered_parameters():
    """With --overlap-param-gather a module's parameters are there once it has been called."""
    options = "--use-distributed-optimizer --expert-model-parallel-size 2 --train-iters 5 --lr 1e-2".split()
    plain = run_job(TOY, XMOE, options, processes=4)
    overlapped = run_job(TOY, XMOE, options, "--overlap-grad-reduce", "--overlap-param-gather", processes=4)
    assert len(plain.losses) == 5
    assert relative_difference(overlapped, plain) < LOSS_TOLERANCE
