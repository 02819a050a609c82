"""Every option that is served trains as stock Megatron does: same losses, same updates, from the same weights."""

from pathlib import Path

import numpy
import pytest
import torch
from jobs import relative_difference, run_job, start_from
from option_cases import CASES, LAYOUTS, MODEL, TRAINING
from recorder import Record
from tolerances import relative_rms_error

ITERATIONS = 10
LOSS_TOLERANCE, HALF_LOSS_TOLERANCE = 1e-5, 1e-4  # relative, of each iteration; half: computed in 16 bits
UPDATE_TOLERANCE, HALF_UPDATE_TOLERANCE = 1e-4, 2e-2  # relative RMS of a tensor's update by one plain SGD step
RUNS = [
    pytest.param(name, layout, id=f"{name}, {layout}", marks=[pytest.mark.slow] * case.slow)
    for name, case in CASES.items()
    for layout in case.layouts
]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> list[str]:
    """Options for a data set of random tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    directory = tmp_path_factory.mktemp("data")
    builder = IndexedDatasetBuilder(f"{directory}/tokens.bin", dtype=numpy.uint16)
    generator = numpy.random.default_rng(0)
    for _ in range(60):
        builder.add_document(generator.integers(0, 60, size=50), [50])
    builder.finalize(f"{directory}/tokens.idx")
    return ["--data-path", f"{directory}/tokens", "--data-cache-path", f"{directory}/cache"]


def train(name: str, backend: str, data: list[str], layout: str, directory: Path) -> list[Record]:
    """What each rank recorded of a case."""
    directory.mkdir()
    case = CASES[name]
    processes, parallelism = LAYOUTS[layout]
    options = case.stock if case.stock and backend == "megatron" else case.options
    environment = {"DROP_EARLIEST": "1"} if case.oracle and backend == "megatron" else {}
    command = [*MODEL, *TRAINING, *data, *options.format(directory=directory).split(), *parallelism.split()]
    if case.loaded:
        weights = directory.parent / "weights"
        if backend == "megatron":
            run_job(command, "--train-iters", "1", "--save", str(weights), *SAVING, processes=processes)
        command += start_from(weights)
    run_job(command, "--moe-backend", backend, processes=processes, recorder=directory, **environment)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def assert_equal_losses(actual: Record, expected: Record, tolerance: float) -> None:
    """Every loss of every iteration that the rank has one of."""
    assert len(expected.losses) == len(actual.losses) == ITERATIONS
    for i, (ours, stock) in enumerate(zip(actual.losses, expected.losses, strict=True)):
        assert ours.keys() == stock.keys()
        for name, loss in stock.items():
            difference = abs(ours[name] - loss) / abs(loss)
            assert difference <= tolerance, f"iteration {i + 1}: {name} {ours[name]}, stock {loss}"


def assert_equal_updates(actual: Record, expected: Record, tolerance: float) -> None:
    """The change of every parameter by the first step that was done, from the same values."""
    before, after = expected.parameters
    assert actual.parameters[0].keys() == before.keys() and len(before) > 10
    for name, start in before.items():
        assert torch.equal(actual.parameters[0][name], start), f"{name} starts with another value"
        update = after[name].double() - start.double()
        error = relative_rms_error(actual.parameters[1][name].double() - start.double(), update)
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("name, layout", RUNS)
def test_trains_as_stock_megatron(name, layout, data, tmp_path):
    stock = train(name, "megatron", data, layout, tmp_path / "megatron")
    xmoe = train(name, "xmoe", data, layout, tmp_path / "xmoe")
    assert any(record.losses[0] for record in stock)
    for ours, expected in zip(xmoe, stock, strict=True):
        assert_equal_losses(ours, expected, HALF_LOSS_TOLERANCE if CASES[name].half else LOSS_TOLERANCE)
        assert_equal_updates(ours, expected, HALF_UPDATE_TOLERANCE if CASES[name].half else UPDATE_TOLERANCE)
        assert ours.skipped == expected.skipped == stock[0].skipped  # every rank skips, or none
    assert 0 < sum(stock[0].skipped) < ITERATIONS // 2 if CASES[name].overflows else not any(stock[0].skipped)


TRAIN_5 = ["--train-iters", "5"]
SAVING = "--save-interval 1 --ckpt-format torch_dist --no-save-optim".split()


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_capacity_is_that_of_a_ranks_micro_batch(policy, data, tmp_path):
    """Each rank drops among its own tokens, so layouts with the same micro-batches drop the same."""
    options = CASES["capacity by weight"].options.split()
    command = [*MODEL, *TRAINING, *data, *options, "--moe-token-drop-policy", policy]
    run_job(command, "--train-iters", "1", "--save", str(tmp_path), *SAVING)
    command += [*TRAIN_5, *start_from(tmp_path)]
    xmoe = ["--moe-backend", "xmoe"]
    expected = run_job(command, *(xmoe if policy == "position" else []))  # stock Megatron's choice is arbitrary
    assert len(expected.losses) == 5
    for processes, layout in ((1, []), (2, []), (2, ["--expert-model-parallel-size", "2"]),
                              (4, ["--expert-model-parallel-size", "2"])):  # fmt: skip
        job = run_job(command, xmoe, layout, processes=processes)
        assert relative_difference(job, expected) < LOSS_TOLERANCE, layout
    dropless = [word for word in command if word not in ("--moe-expert-capacity-factor", "1.0")]
    dropless = [word for word in dropless if word not in ("--moe-token-drop-policy", policy, "probs")]
    assert relative_difference(run_job(dropless, xmoe), expected) > 1e-3  # something was dropped


def test_checkpoint_of_sharded_experts_moves(data, tmp_path):
    """Saved with each expert on two ranks, it goes on in any layout, and in stock Megatron."""
    command = [*MODEL, *TRAINING, *data, *CASES["tensor-parallel experts"].options.split()]
    xmoe, (processes, sharded) = ["--moe-backend", "xmoe"], LAYOUTS["TP2 ETP2"]
    run_job(command, xmoe, sharded.split(), "--train-iters", "1", "--save", str(tmp_path), *SAVING, processes=processes)
    command += [*TRAIN_5, *start_from(tmp_path)]
    expected = run_job(command, sharded.split(), processes=processes)  # stock Megatron reads it
    assert len(expected.losses) == 5
    for name in ("one process", "EP2", "TP2 ETP2", "TP2 EP2 ETP2"):
        processes, layout = LAYOUTS[name]
        job = run_job(command, xmoe, layout.split(), processes=processes)
        assert relative_difference(job, expected) < LOSS_TOLERANCE, name
