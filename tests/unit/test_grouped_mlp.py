"""The experts' MLP over every backend that can run here, against loops: output, every gradient, what is saved.

Triton's kernels run in its interpreter, in a process of their own, which has to be told before Triton is imported.
"""

import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import cache, cached_property
from multiprocessing import get_context
from unittest import mock

import harness
import oracles
import pytest
import torch
import torch.nn.functional as F
from interpreter import mend_interpreter
from tolerances import RELATIVE_RMS, assert_close, assert_same, relative_rms_error
from torch import Tensor

from megatron_xmoe.kernels import grouped_gemm as choice
from megatron_xmoe.ops.activation import Activation
from megatron_xmoe.ops.grouped_gemm import Groups, backend
from megatron_xmoe.ops.grouped_mlp import ExpertWeights, grouped_mlp
from megatron_xmoe.ops.rows import RowsSource


def squared_relu(x: Tensor) -> Tensor:
    return x.clamp_min(0).square()


ACTIVATIONS = {"SwiGLU": (F.silu, True), "GeGLU": (F.gelu, True), "GELU": (F.gelu, False),
               "squared ReLU": (squared_relu, False)}  # fmt: skip
SIZES = {"uneven": [3, 0, 5, 1], "none": [0, 0, 0], "all to one": [0, 0, 9], "one expert": [4], "many": [17, 1, 0, 40],
         "hundreds": [60, 130, 0, 10], "hundreds to one": [0, 200]}  # fmt: skip
# which sizes in which type: the error of rounding to 16 bits is what it is expected to be over many numbers only
SIZES_IN = {torch.float32: ("uneven", "none", "all to one", "one expert", "many"),
            torch.bfloat16: ("none", "hundreds", "hundreds to one")}  # fmt: skip
SOURCES = ("rows in order", "an index", "tokens and their inverse")
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("output", "rows", "probs", "fc1", "fc2", "bias1", "bias2")
INTERPRETED = {"TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Problem:
    """Inputs of one call."""

    inputs: list[Tensor]
    """Source rows [R, H], probs [M], fc1, fc2, and both biases where there are some."""

    grad: Tensor
    index: list[int]
    experts: list[int]
    inverse: Tensor | None
    sizes: list[int]
    activation: str
    source: str

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        """The activation function."""
        return ACTIVATIONS[self.activation][0]

    @property
    def gated(self) -> bool:
        """Whether the activation has a gate."""
        return ACTIVATIONS[self.activation][1]


    @cached_property
    def expected(self) -> list[Tensor]:
        """Output and gradients by the loop oracle, in fp64."""

        def function(*inputs: Tensor) -> Tensor:
            return oracles.grouped_mlp(
                *inputs, index=self.index, experts=self.experts, function=self.function, gated=self.gated
            )

        output, grads = oracles.gradients(function, self.inputs, self.grad)
        return [output, *grads]


@cache
def problem(
    sizes: str, activation: str = "SwiGLU", biases: bool = False, source: str = "rows in order",
    dtype: torch.dtype = torch.float64, hidden: int = 12, ffn: int = 10, seed: int = 0,
) -> Problem:  # fmt: skip
    """Random inputs; the sizes are no multiples of 8, and nothing may depend on that."""
    generator = torch.Generator().manual_seed(seed)
    counts = SIZES[sizes]
    rows, experts, gated = sum(counts), len(counts), ACTIVATIONS[activation][1]
    width = 2 * ffn if gated else ffn

    def random(*shape: int, scale: float = 1) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    index, inverse, num_rows = list(range(rows)), None, rows
    if source != "rows in order":
        num_rows = rows // 2 + 1  # the last one is in nobody's list, some are in several
        index = torch.randint(max(num_rows - 1, 1), (rows,), generator=generator).tolist()
    if source == "tokens and their inverse":
        places = [[m for m, i in enumerate(index) if i == r] for r in range(num_rows)]
        most = max(2, *map(len, places))
        inverse = torch.tensor([place + [-1] * (most - len(place)) for place in places], dtype=torch.int32)
    inputs = [
        random(num_rows, hidden), torch.rand(rows, generator=generator, dtype=torch.float64).to(wide(dtype)),
        random(experts, width, hidden, scale=hidden**-0.5), random(experts, hidden, ffn, scale=ffn**-0.5),
    ]  # fmt: skip
    if biases:
        inputs += [random(experts, width, scale=0.2), random(experts, hidden, scale=0.2)]
    of_rows = [expert for expert, count in enumerate(counts) for _ in range(count)]
    return Problem(inputs, random(rows, hidden), index, of_rows, inverse, counts, activation, source)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The routing weights' type, as Megatron's router gives them."""
    return torch.promote_types(dtype, torch.float32)


def compute(name: str, given: Problem, recompute: bool = False) -> list[Tensor]:
    """Output and gradients of a backend, in the order of NAMES."""
    leaves = [x.clone().requires_grad_() for x in given.inputs]
    output = call(name, given, leaves, recompute)
    output.backward(given.grad)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def call(name: str, given: Problem, leaves: list[Tensor], recompute: bool = False, **options) -> Tensor:
    """The MLP of these leaves."""
    rows, probs, *weights = leaves
    source = RowsSource(rows)
    if given.source != "rows in order":
        source = RowsSource(rows, torch.tensor(given.index, dtype=torch.int32), given.inverse)
    groups = Groups.of(torch.tensor(given.sizes), rows.device)
    activation = Activation(given.function, given.gated)
    return grouped_mlp(
        source, probs, ExpertWeights(*weights), groups, activation, backend(name), recompute, **options
    )


def why_not_triton() -> str:
    """In the process of its own: why Triton's kernels cannot run there, or ''."""
    (candidate,) = (c for c in choice.grouped_gemm_candidates("cpu", torch.float32) if c.name == "triton")
    return "" if candidate.usable else candidate.reason


def run_interpreted(task: bytes) -> bytes:
    """In the process of its own: the pickled results of a pickled call of `compute`."""
    mend_interpreter()
    with harness.poisoned_memory():
        return pickle.dumps([compute(*arguments) for arguments in pickle.loads(task)])


@dataclass(frozen=True)
class Computing:
    """One backend, wherever it runs."""

    run: Callable[[list[tuple]], list[list[Tensor]]]
    """`compute` for each (problem, whether to recompute)."""

    less_exact: float = 1
    """Factor of the tolerance in 16 bits: Triton's interpreter cuts results off instead of rounding them, and
    grouped_mm rounds before a bias is added."""


@pytest.fixture(scope="module", params=choice.BACKENDS)
def computing(request) -> Iterator[Computing]:
    """Every backend; skipped with the reason where it cannot run at all."""
    name = request.param
    if name == "triton":
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
            with mock.patch.dict(os.environ, INTERPRETED):
                # the process starts, and takes its environment, with the first task; here the kernels would stay what
                # they are when their module is first imported
                reason = worker.submit(why_not_triton).result()
            if reason:
                pytest.skip(f"triton: {reason}")

            def run(calls: list[tuple]) -> list[list[Tensor]]:
                task = pickle.dumps([(name, *call) for call in calls])
                return pickle.loads(worker.submit(run_interpreted, task).result())

            yield Computing(run, less_exact=4)
        return
    if name == "torch":
        try:  # it has a slow version for CPUs, which the registry does not offer
            compute(name, problem("many", dtype=torch.bfloat16, hidden=16, ffn=8))
        except RuntimeError as error:
            pytest.skip(f"torch: grouped_mm does not run on a CPU here: {error}")
    yield Computing(lambda calls: [compute(name, *arguments) for arguments in calls], 1.25 if name == "torch" else 1)


def agree(results: list[list[Tensor]], problems: list[Problem], bound: float) -> None:
    """All outputs and gradients are the oracle's."""
    for result, given in zip(results, problems, strict=True):
        for name, actual, exact in zip(NAMES, result, given.expected, strict=False):
            assert actual is not None, f"{name} has no gradient"
            error = relative_rms_error(actual, exact)
            assert error <= bound, f"{name} of {given.sizes}, {given.source}: {error:.3g}"
        for actual, original in zip(result[1:], given.inputs, strict=True):
            assert actual.dtype == original.dtype and actual.shape == original.shape


def even(sizes: str) -> dict[str, int]:
    """Feature sizes that every backend takes: grouped_mm wants rows of 16 bytes."""
    return {"hidden": 16, "ffn": 40} if sizes == "uneven" else {"hidden": 40, "ffn": 24}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", [False, True], ids=["without biases", "with biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_and_gradients(computing, activation, biases, dtype):
    problems = [
        problem(sizes, activation, biases, source, dtype, **even(sizes))
        for sizes, source in itertools.product(SIZES_IN[dtype], SOURCES)
    ]
    bound = RELATIVE_RMS[dtype]
    if dtype == torch.bfloat16:
        bound *= computing.less_exact
    agree(computing.run([(given, False) for given in problems]), problems, bound)


@pytest.mark.parametrize("biases", [False, True], ids=["without biases", "with biases"])
def test_recomputed_pre_activation(computing, biases):
    """Bit for bit what is computed without."""
    problems = [problem("many", "SwiGLU", biases, source, torch.float32, **even("many")) for source in SOURCES]
    plain, recomputed = (computing.run([(given, again) for given in problems]) for again in (False, True))
    for one, other in zip(plain, recomputed, strict=True):
        for x, y in zip(one, other, strict=True):
            assert_same(x, y)


def test_reproducible(computing):
    problems = [problem("many", "SwiGLU", True, source, torch.float32, **even("many")) for source in SOURCES]
    first, second = (computing.run([(given, False) for given in problems]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for x, y in zip(one, other, strict=True):
            assert_same(x, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES_IN[torch.float32])
def test_odd_sizes_in_fp64(sizes, activation):
    """Features that are multiples of nothing, which the loop serves."""
    problems = [problem(sizes, activation, biases, source) for biases in (False, True) for source in SOURCES]
    agree([compute("loop", given) for given in problems], problems, RELATIVE_RMS[torch.float64])


@pytest.mark.parametrize("limits", [{"limit": 0.4}, {"offset": 1.0}, {"limit": 0.7, "offset": 0.5}])
def test_clamped_gates_have_no_kernel_name(limits):
    """So that a backend with the activation in its products composes it instead."""
    assert Activation(F.silu, True).kind == "silu" and Activation(squared_relu, False).kind == "squared_relu"
    assert Activation(F.silu, True, **limits).kind is None and Activation(torch.tanh, False).kind is None


def saved_bytes(given: Problem, recompute: bool) -> tuple[int, int]:
    """Bytes of rows that are kept for backward, and of everything else but the weights; each storage once."""
    leaves = [x.clone().requires_grad_() for x in given.inputs]
    weights = {x.untyped_storage().data_ptr() for x in leaves[2:]}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = call("loop", given, leaves, recompute)
    del output
    matrices = [x for x in kept.values() if x.dim() == 2 and x.is_floating_point()]
    rest = [x for x in kept.values() if x.dim() != 2 or not x.is_floating_point()]
    return tuple(sum(x.untyped_storage().nbytes() for x in some) for some in (matrices, rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_saved_bytes(source, recompute, dtype):
    """The source's rows and, unless it is recomputed, the pre-activation."""
    given = problem("many", source=source, dtype=dtype)
    (rows, hidden), routes = given.inputs[0].shape, len(given.index)
    matrices, rest = saved_bytes(given, recompute)
    assert matrices == dtype.itemsize * (rows * hidden + (0 if recompute else routes * 2 * 10))
    index = 0 if source == "rows in order" else 4 * routes
    inverse = 0 if given.inverse is None else 4 * given.inverse.numel()
    assert rest == 4 * routes + index + inverse  # the routing weights in fp32


def accumulate(given: Problem, marks: dict, name: str = "loop") -> tuple[list[Tensor], list[Tensor]]:
    """Two micro-batches with main_grads; the weights' attributes and gradients afterwards."""
    weights = [torch.nn.Parameter(x.clone()) for x in given.inputs[2:]]
    for weight in weights[:2]:
        weight.main_grad = torch.zeros(weight.shape, dtype=torch.float32)
        vars(weight).update(marks)
    for factor in (1, 2):
        rows, probs = (x.clone().requires_grad_() for x in given.inputs[:2])
        output = call(name, given, [rows, probs, *weights], into_main_grad=True)
        output.backward(factor * given.grad)
    return weights, [weight.main_grad for weight in weights[:2]]


@pytest.mark.parametrize("name", ["loop", "torch"])
def test_main_grad_over_micro_batches(name):
    """In fp32 from bf16 operands: what is added is not rounded to bf16 before (by the loop)."""
    given = problem("many", dtype=torch.bfloat16, **even("many"))
    weights, main_grads = accumulate(given, {"grad_added_to_main_grad": False}, name)
    single = compute("loop", upcast(given))  # operands that are rounded nowhere
    rounded = compute(name, given)
    for weight, main_grad, exact, once in zip(weights, main_grads, single[3:5], rounded[3:5], strict=False):
        assert weight.grad_added_to_main_grad is True
        assert weight.grad.shape == weight.shape and weight.grad.dtype == weight.dtype
        assert_close(main_grad, 3 * exact.double(), torch.bfloat16)
        assert main_grad.dtype == torch.float32
        steps = torch.equal(main_grad.bfloat16().float(), main_grad)
        assert not steps, "every sum is a bf16 number"
        if name == "torch":
            assert_same(main_grad, once.float() + compute(name, scaled(given, 2))[3 + (weight is weights[1])].float())


def fields_of(given: Problem) -> dict:
    """The problem's fields."""
    return {field.name: getattr(given, field.name) for field in fields(given)}


def upcast(given: Problem) -> Problem:
    """The problem in fp32."""
    return Problem(**fields_of(given) | {"inputs": [x.float() for x in given.inputs], "grad": given.grad.float()})


def scaled(given: Problem, factor: float) -> Problem:
    """The problem with another gradient of the output."""
    return Problem(**fields_of(given) | {"grad": factor * given.grad})


def test_main_grad_is_exact():
    """In fp32 throughout, the sum over micro-batches is that of the gradients that autograd would get."""
    given = problem("many", dtype=torch.float32, source="an index")
    _, main_grads = accumulate(given, {})
    plain = compute("loop", given)
    for main_grad, grad in zip(main_grads, plain[3:5], strict=True):
        assert relative_rms_error(main_grad, 3 * grad.double()) < 1e-6


def test_the_loop_adds_without_rounding():
    """fp32 sums of bf16 products, as exact as fp32 is: a rounding to bf16 would show a thousand times."""
    given = problem("many", dtype=torch.bfloat16)
    rows = given.inputs[0]
    grad = torch.randn(rows.shape[0], 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    groups = Groups.of(torch.tensor(given.sizes), rows.device)
    total = torch.zeros(len(given.sizes), 6, rows.shape[1])
    for _ in range(3):
        assert backend("loop").weight_gradient(grad, rows, groups, into=total) is total
    exact = backend("loop").weight_gradient(grad.double(), rows.double(), groups)
    assert relative_rms_error(total, 3 * exact) < 1e-6


@pytest.mark.parametrize("marks, stand_in", [
    ({}, None), ({"grad_added_to_main_grad": False}, "anything"),
    ({"grad_added_to_main_grad": False, "zero_out_wgrad": True}, "zeros"),
])  # fmt: skip
def test_what_autograd_gets_beside_main_grad(marks, stand_in):
    """Nothing where no hook waits for it; zeros where Megatron adds it all the same."""
    weights, _ = accumulate(problem("uneven", biases=True, dtype=torch.float32), marks)
    for weight in weights[:2]:
        assert (weight.grad is None) == (stand_in is None)
        if stand_in == "zeros":
            assert not weight.grad.any()
        if stand_in == "anything":  # memory that nobody wrote
            assert weight.grad.isnan().all()
    assert all(bias.grad.isfinite().all() and bias.grad.any() for bias in weights[2:])


def test_weights_without_main_grad_get_their_gradient():
    """As in evaluation of a model that is not wrapped for data parallelism."""
    given = problem("uneven")
    leaves = [x.clone().requires_grad_() for x in given.inputs]
    call("loop", given, leaves, into_main_grad=True).backward(given.grad)
    for leaf, grad in zip(leaves, compute("loop", given)[1:], strict=True):
        assert_same(leaf.grad, grad)


@pytest.mark.parametrize("frozen", [(0,), (2,), (3,), (2, 3), (1, 2, 3)])
def test_frozen_inputs(frozen):
    """What needs no gradient gets none, and the others theirs."""
    given = problem("uneven", source="an index", biases=True)
    leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(given.inputs)]
    call("loop", given, leaves).backward(given.grad)
    for i, (leaf, grad) in enumerate(zip(leaves, compute("loop", given)[1:], strict=True)):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert_same(leaf.grad, grad)


def test_auto_takes_what_the_table_says(monkeypatch):
    assert choice.choose_grouped_gemm("auto", "cpu", torch.float32).name == "loop"
    monkeypatch.setattr(choice, "_why_not_triton", lambda *_: "not today")
    monkeypatch.setattr(choice, "_why_not_torch", lambda *_: "")
    monkeypatch.setattr(torch.version, "hip", None)
    found = choice.choose_grouped_gemm("auto", "cuda", torch.bfloat16)
    assert found.name == "torch" and "not triton: not today" in found.reason
    monkeypatch.setattr(choice, "_why_not_triton", lambda *_: "")
    assert choice.choose_grouped_gemm("auto", "cuda", torch.bfloat16).name == "triton"
    assert choice.choose_grouped_gemm("auto", "cuda", torch.float32).name == "loop"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(choice, "_why_not_triton", lambda *_: "not today")
    assert choice.choose_grouped_gemm("auto", "cuda", torch.bfloat16).name == "loop"
    assert choice.choose_grouped_gemm("loop", "cuda", torch.bfloat16).reason.startswith("pinned")
    for row in choice.AUTO.values():
        assert row[-1] == "loop" and set(row) <= set(choice.BACKENDS)


@pytest.mark.parametrize("dtype, features, device, reason", [
    (torch.bfloat16, (), "cpu", "no GPU"),
    (torch.float32, (), "cuda", "torch.float32 instead of bfloat16"),
    (torch.bfloat16, (64, 33), "cuda", "feature size 33, no multiple of 8"),
    (torch.bfloat16, (64, 32), "cuda", ""),
])  # fmt: skip
def test_what_grouped_mm_takes(monkeypatch, dtype, features, device, reason):
    monkeypatch.setattr(choice, "_capability", lambda: (9, 0))
    (found,) = (c for c in choice.grouped_gemm_candidates(device, dtype, features) if c.name == "torch")
    assert found.usable == (not reason) and (not reason or found.reason == reason)
    if reason:
        with pytest.raises(ValueError, match=f"--xmoe-grouped-gemm torch cannot run on .*: {reason}.* Fix: .*loop"):
            choice.choose_grouped_gemm("torch", device, dtype, features)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="--xmoe-grouped-gemm fast is unknown; it must be auto or one of triton, "):
        choice.choose_grouped_gemm("fast", "cpu", torch.float32)
