"""Tensor parallelism without --sequence-parallel trains as one process does: losses, gradients, updates."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jobs import TOY, run_job, saved_tensors, start_from
from recorder import Record
from tolerances import relative_rms_error

ITERATIONS = 20
LOSS_TOLERANCE = 1e-5  # relative, of each iteration
GRADIENT_TOLERANCE = 1e-5  # relative RMS of each tensor's gradient at iteration 1
UPDATE_TOLERANCE = 1e-4  # the same for the change by plain SGD: the weights' rounding is in it
# the same for all; weights so large that experts matter, heads for four ranks
TRAINED = """
    --num-query-groups 4 --init-method-std 0.1 --optimizer sgd --sgd-momentum 0 --clip-grad 0 --weight-decay 0
    --lr 0.1 --min-lr 0.1
""".split()
PER_TOKEN = "--calculate-per-token-loss"
ADAM = "--optimizer adam --lr 1e-3 --min-lr 1e-3"  # the distributed optimizer takes nothing simpler
BIAS = (
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2 "
    "--moe-router-load-balancing-type seq_aux_loss --moe-shared-expert-gate"
)


@dataclass(frozen=True)
class Case:
    """Processes and options of a run that is compared with one process."""

    processes: int
    layout: str
    model: str = ""
    """Options of the reference, too."""

    slow: bool = True


TP2, TP4 = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"
EP2, EP4 = "--expert-model-parallel-size 2", "--expert-model-parallel-size 4"
PP2 = "--pipeline-model-parallel-size 2"
CASES = {
    "TP2": Case(2, TP2),
    "TP2 x EP2": Case(2, f"{TP2} {EP2}", slow=False),
    "TP2 x EP2, duplicated": Case(2, f"{TP2} {EP2} --xmoe-sequence-shard off"),
    "TP2 x EP2, whole shared experts": Case(2, f"{TP2} {EP2} --xmoe-shared-expert sequence"),
    "TP2 x EP2, per token": Case(2, f"{TP2} {EP2}", PER_TOKEN),
    "TP2 x EP2, duplicated, per token": Case(2, f"{TP2} {EP2} --xmoe-sequence-shard off", PER_TOKEN),
    "TP2 x EP2, expert bias": Case(2, f"{TP2} {EP2}", BIAS),
    "TP2 x EP2, uneven": Case(2, f"{TP2} {EP2}", "--seq-length 15 --max-position-embeddings 15"),
    "TP2 x EP2, recomputed": Case(2, f"{TP2} {EP2} --recompute-granularity selective --recompute-modules moe"),
    "TP2, sharded experts": Case(2, f"{TP2} --expert-tensor-parallel-size 2"),  # duplicated by default
    "TP2 x DP2": Case(4, TP2),
    "TP2 x EP4 x DP2": Case(4, f"{TP2} {EP4}"),
    "TP2 x EP2 x DP2, distributed optimizer": Case(4, f"{TP2} {EP2} --use-distributed-optimizer", ADAM),
    "TP4": Case(4, TP4),
    "TP4 x EP2": Case(4, f"{TP4} {EP2}"),
    "TP4 x EP4": Case(4, f"{TP4} {EP4}"),
    "TP4 x EP2, duplicated, sharded experts": Case(4, f"{TP4} {EP2} --expert-tensor-parallel-size 2"),
    "PP2 x TP2": Case(4, f"{PP2} {TP2} {EP2}"),
    "interleaved PP2 x TP2": Case(4, f"{PP2} {TP2} {EP2} --num-virtual-stages-per-pipeline-rank 3"),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """A function of the model's options: weights that stock Megatron saved; its run from them in one process; and the
    auxiliary losses that it showed."""
    known: dict[str, tuple[Path, Record, list]] = {}

    def reference(model: str) -> tuple[Path, Record, list]:
        if model not in known:
            directory = tmp_path_factory.mktemp("weights")
            saving = ["--save", str(directory), "--save-interval", "1", "--ckpt-format", "torch_dist"]
            run_job(TOY, TRAINED, model.split(), "--train-iters", "1", saving)
            run = tmp_path_factory.mktemp("one")
            known[model] = directory, trained(model, start_from(directory), 1, run)[0], router_losses(run)
        return known[model]

    return reference


def trained(model: str, options: list[str], processes: int, directory: Path) -> list[Record]:
    """What each rank recorded of a run."""
    command = [*TOY, *TRAINED, *model.split(), "--train-iters", str(ITERATIONS), *options]
    job = run_job(command, processes=processes, recorder=directory)
    (directory / "output").write_text(job.output)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def router_losses(directory: Path) -> list[tuple[str, float]]:
    """Auxiliary losses that the console shows, in order."""
    shown = re.findall(r"(\w*load_balancing_loss|z_loss): ([-+0-9.E]+)", (directory / "output").read_text())
    return [(name, float(value)) for name, value in shown]


def assembled(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the ranks' parts, {'name @ place': part}; what several ranks have is the same to rounding."""
    places: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
    for parts in ranks:
        for label, part in parts.items():
            name, place = label.split(" @ ")
            place = ast.literal_eval(place)
            places.setdefault(name, []).append((place, part[(None,) * (len(place) - part.dim())]))
    result = {}
    for name, parts in places.items():
        ends = [[o + n for o, n in zip(place, part.shape, strict=True)] for place, part in parts]
        tensor = torch.full([max(column) for column in zip(*ends, strict=True)], float("nan"))
        for place, part in parts:
            index = tuple(slice(o, o + n) for o, n in zip(place, part.shape, strict=True))
            assert tensor[index].isnan().all() or relative_rms_error(tensor[index], part) < GRADIENT_TOLERANCE, name
            tensor[index] = part
        assert not tensor.isnan().any(), name
        result[name] = tensor
    return result


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * case.slow) for n, case in CASES.items()])
def test_trains_as_one_process(name, references, tmp_path):
    case = CASES[name]
    weights, reference, expected_losses = references(case.model)
    options = [*case.layout.split(), "--moe-backend", "xmoe", *start_from(weights)]
    ranks = trained(case.model, options, case.processes, tmp_path)
    told, duplicated = (tmp_path / "output").read_text(), ("shard off", "expert-tensor-parallel-size")
    assert ("ranks computes all tokens" in told) == any(option in case.layout for option in duplicated)
    assert ("ranks takes its share of the tokens" in told) != ("ranks computes all tokens" in told)
    losses = [rank.losses for rank in ranks if rank.losses[0]]
    assert losses and len(reference.losses) == ITERATIONS
    for found in losses:
        for i, (ours, expected) in enumerate(zip(found, reference.losses, strict=True)):
            assert ours.keys() == expected.keys()
            for loss, value in expected.items():
                assert abs(ours[loss] - value) <= LOSS_TOLERANCE * abs(value), f"iteration {i + 1}: {loss}"
    assert len(expected_losses) in (2 * ITERATIONS, 3 * ITERATIONS)  # with more than one kind, zeros of the others
    for (name, value), (expected_name, expected) in zip(router_losses(tmp_path), expected_losses, strict=True):
        assert name == expected_name and abs(value - expected) <= 1e-4 * abs(expected)
    updates = [updates_of(rank) for rank in ranks]
    compared = {
        "gradient": ([rank.gradients for rank in ranks], reference.gradients, GRADIENT_TOLERANCE),
        "update": (updates, updates_of(reference), UPDATE_TOLERANCE),
    }
    if case.model == ADAM:  # no rank has whole gradients, and updates hardly depend on their size: losses only
        compared = {}
    for what, (actual, expected, tolerance) in compared.items():
        actual, expected = assembled(actual), assembled([expected])
        assert actual.keys() == expected.keys() and len(actual) > 20
        for tensor, value in expected.items():
            error = relative_rms_error(actual[tensor], value)
            assert value.norm() > 0 and error < tolerance, f"{what} of {tensor}: {error}"


def updates_of(record: Record) -> dict[str, torch.Tensor]:
    """The change of every parameter by the first step."""
    before, after = record.parameters
    return {name: after[name] - start for name, start in before.items()}


@pytest.mark.parametrize("shared", ["tensor", pytest.param("sequence", marks=pytest.mark.slow)])
def test_checkpoints_are_megatrons(shared, references, tmp_path):
    """What a sharded run saves has the names, shapes and values of what stock Megatron saves in one process."""
    weights, *_ = references("")
    saving = ["--save-interval", "2", "--ckpt-format", "torch_dist", "--no-save-optim", "--train-iters", "2"]
    xmoe = [*f"{TP2} {EP2} --moe-backend xmoe --xmoe-shared-expert".split(), shared]
    saved = []
    for name, processes, options in (("stock", 1, []), ("xmoe", 2, xmoe)):
        command = [*TOY, *TRAINED, *start_from(weights), *saving, "--save", str(tmp_path / name), *options]
        run_job(command, processes=processes)
        tensors = saved_tensors(tmp_path / name, 2)
        saved.append({key: tensor for key, tensor in tensors.items() if "rng" not in key})
    stock, xmoe = saved
    assert xmoe.keys() == stock.keys() and any("shared_experts" in name for name in stock)
    for name, tensor in stock.items():
        assert xmoe[name].shape == tensor.shape
        if tensor.is_floating_point():
            assert relative_rms_error(xmoe[name], tensor) < GRADIENT_TOLERANCE, name
