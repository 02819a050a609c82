"""Expert parallelism placed over neighbouring ranks or over distant ones trains the same model."""

import pytest
from jobs import TOY, relative_difference, run_job, saved_tensors

OPTIONS = [*TOY, *"--moe-backend xmoe --expert-model-parallel-size 2 --ckpt-format torch_dist".split()]
SCHEDULE = "--train-iters 6 --lr-decay-iters 6 --save-interval 3".split()
DP_FIRST = "--xmoe-ep-placement dp-first".split()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("", id="plain", marks=pytest.mark.slow),
        pytest.param("--use-distributed-optimizer", id="distributed optimizer"),
    ],
)
def runs(request, tmp_path_factory):
    """EP2 and two replicas of each expert on four processes, in both placements: options, runs, directories."""
    options = [*OPTIONS, *SCHEDULE, *request.param.split()]
    directories = [tmp_path_factory.mktemp(name) for name in ("ep_first", "dp_first")]
    jobs = [
        run_job(options, *more, "--save", str(directory), processes=4)
        for more, directory in zip(([], DP_FIRST), directories, strict=True)
    ]
    return options, jobs, directories


def test_losses_are_the_same(runs):
    _, (ep_first, dp_first), directories = runs
    assert "placement    ep-first: an expert-parallel group on neighbouring ranks" in ep_first.output
    assert "placement    dp-first: the replicas of an expert on neighbouring ranks" in dp_first.output
    assert "expert 2, rank 0 with [0, 1]" in ep_first.output and "expert-data 2, rank 0 with [0, 2]" in ep_first.output
    assert "expert 2, rank 0 with [0, 2]" in dp_first.output and "expert-data 2, rank 0 with [0, 1]" in dp_first.output
    assert len(ep_first.losses) == 6
    assert relative_difference(dp_first, ep_first) < 1e-5
    for i, norm in ep_first.grad_norms.items():
        assert dp_first.grad_norms[i] == pytest.approx(norm, rel=1e-4)
    expected, tensors = (saved_tensors(directory, 6) for directory in directories)
    assert len(expected) > 100 and tensors.keys() == expected.keys()


@pytest.mark.parametrize("placement", [[], DP_FIRST], ids=["ep-first", "dp-first"])
def test_a_checkpoint_goes_on_in_either_placement(runs, placement):
    """From iteration 3 of the run with replicas on neighbouring ranks; optimizer states included."""
    options, (_, dp_first), (_, directory) = runs
    resumed = run_job(options, placement, "--load", str(directory), "--ckpt-step", "3", processes=4)
    assert list(resumed.losses) == [4, 5, 6]
    for i in (4, 6):  # Megatron's console shows a mean at the second iteration after a resume
        assert resumed.losses[i] == pytest.approx(dp_first.losses[i], rel=1e-5)
    for i, norm in resumed.grad_norms.items():
        assert norm == pytest.approx(dp_first.grad_norms[i], rel=1e-4)
