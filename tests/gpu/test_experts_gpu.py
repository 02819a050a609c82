"""The experts' MLP on a GPU with every backend that can run there, against fp64; and its parts by themselves."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.gpu
SIZES = {"uneven": [5, 0, 130, 1, 64, 0, 0, 17], "none": [0] * 8, "all to one": [0, 0, 0, 300, 0, 0, 0, 0],
         "one expert": [77], "larger than tiles": [700, 3, 0, 1100]}  # fmt: skip
SHAPES = [(128, 192), (256, 96), (136, 40)]  # hidden size, FFN size
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 1e-5}  # relative RMS error


def squared_relu(x: Tensor) -> Tensor:
    return x.clamp_min(0).square()


ACTIVATIONS = {"SwiGLU": (F.silu, True), "GeGLU": (F.gelu, True), "GELU": (F.gelu, False),
               "squared ReLU": (squared_relu, False)}  # fmt: skip


@pytest.fixture(params=["triton", "torch", "loop"])
def name(request) -> str:
    """A backend of the products; skipped with the reason where it cannot run on this GPU."""
    from megatron_xmoe.kernels.grouped_gemm import grouped_gemm_candidates

    found = {c.name: c for c in grouped_gemm_candidates("cuda", torch.bfloat16)}
    if not found[request.param].usable:
        pytest.skip(f"{request.param}: {found[request.param].reason}")
    return request.param


def skip_unless_it_takes(name: str, dtype: torch.dtype, features: tuple[int, ...]) -> None:
    """Skip, with the reason, a type or sizes that a backend does not serve."""
    from megatron_xmoe.kernels.grouped_gemm import grouped_gemm_candidates

    found = {c.name: c for c in grouped_gemm_candidates("cuda", dtype, features)}
    if not found[name].usable:
        pytest.skip(f"{name}: {found[name].reason}")


@pytest.fixture(autouse=True)
def exact_products():
    """The same numbers every time, and no TF32 in products of fp32."""
    torch.manual_seed(1)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def poison() -> None:
    """Memory that is freed at once, so that what nothing wrote holds NaN."""
    torch.full((64 << 20,), float("nan"), device="cuda")


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Shapes and relative RMS error."""
    assert actual.shape == expected.shape and torch.isfinite(actual).all()
    assert (actual.double() - expected.double()).norm() <= bound * expected.double().norm()


def random(*shape: int, dtype: torch.dtype, scale: float = 1) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("hidden, ffn", SHAPES)
def test_products_and_weight_gradients(name, hidden, ffn, sizes, dtype):
    from megatron_xmoe.ops.grouped_gemm import Groups, backend

    skip_unless_it_takes(name, dtype, (hidden, ffn))
    counts = torch.tensor(SIZES[sizes])
    groups, rows, experts = Groups.of(counts, torch.device("cuda")), int(counts.sum()), len(counts)
    source = random(rows + 3, hidden, dtype=dtype)
    index = torch.randint(rows + 3, (rows,), device="cuda", dtype=torch.int32)
    weight, grad = random(experts, ffn, hidden, dtype=dtype), random(rows, ffn, dtype=dtype)
    exact, gemm, bound = backend("loop"), backend(name), TOLERANCE[dtype]
    for at in (None, index):
        x = source[:rows] if at is None else source
        poison()
        close(gemm.multiply(x, weight, groups, at), exact.multiply(x.double(), weight.double(), groups, at), bound)
    x = source[:rows]
    wanted = exact.weight_gradient(grad.double(), x.double(), groups)
    poison()
    close(gemm.weight_gradient(grad, x, groups), wanted, bound)
    start = random(experts, ffn, hidden, dtype=torch.float32)
    total = gemm.weight_gradient(grad, x, groups, into=start.clone())
    assert total.dtype == torch.float32
    # sums in fp32 of what was not rounded before; torch's products are
    close(total, start.double() + wanted, bound if name == "torch" else 1e-5)
    poison()
    found = gemm.multiply(grad, weight, groups, transposed=True)
    close(found, exact.multiply(grad.double(), weight.double(), groups, transposed=True), bound)


def mlp(name: str, leaves: list[Tensor], index, inverse, sizes: list[int], kind: str, recompute: bool) -> Tensor:
    """The MLP of these leaves."""
    from megatron_xmoe.ops.activation import Activation
    from megatron_xmoe.ops.grouped_gemm import Groups, backend
    from megatron_xmoe.ops.grouped_mlp import ExpertWeights, grouped_mlp
    from megatron_xmoe.ops.rows import RowsSource

    tokens, probs, *weights = leaves
    groups = Groups.of(torch.tensor(sizes), tokens.device)
    source, activation = RowsSource(tokens, index, inverse), Activation(*ACTIVATIONS[kind])
    return grouped_mlp(source, probs, ExpertWeights(*weights), groups, activation, backend(name), recompute)


def results(name: str, inputs: list[Tensor], grad: Tensor, *given) -> list[Tensor]:
    """Output of the MLP, and gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    poison()
    output = mlp(name, leaves, *given)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True], ids=["without biases", "with biases"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("ordered", [True, False], ids=["rows in order", "tokens and an index"])
def test_whole_mlp(name, kind, biases, recompute, ordered, dtype):
    """Output and every gradient against the loop in fp64, twice the same bits."""
    small = itertools.product(SHAPES[:2], SIZES.values())
    for (hidden, ffn), sizes in [*small, ((1024, 704), SIZES["larger than tiles"])]:
        skip_unless_it_takes(name, dtype, (hidden, ffn))
        rows, experts, width = sum(sizes), len(sizes), ffn * (2 if ACTIVATIONS[kind][1] else 1)
        index = inverse = None
        tokens = rows
        if not ordered:  # two routes a token, the last ones only one
            tokens = (rows + 1) // 2
            order = torch.randperm(2 * tokens, device="cuda", dtype=torch.int32)
            index = (order // 2)[:rows].contiguous()
            places = torch.full((2 * tokens,), -1, device="cuda", dtype=torch.int32)
            places[order[:rows].long()] = torch.arange(rows, device="cuda", dtype=torch.int32)
            inverse = places.view(tokens, 2)
        inputs = [
            random(tokens, hidden, dtype=dtype), torch.rand(rows, device="cuda"),
            random(experts, width, hidden, dtype=dtype, scale=hidden**-0.5),
            random(experts, hidden, ffn, dtype=dtype, scale=ffn**-0.5),
        ]  # fmt: skip
        if biases:
            inputs += [random(experts, width, dtype=dtype, scale=0.2), random(experts, hidden, dtype=dtype, scale=0.2)]
        grad = random(rows, hidden, dtype=dtype)
        given = (index, inverse, sizes, kind, recompute)
        first, second = (results(name, inputs, grad, *given) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        exact = results("loop", [x.double() for x in inputs], grad, *given)
        # few numbers have few roundings, whose error is not the expected one; biases are added to rounded products
        factor = 1.5 if min(rows, hidden) < 1000 else 1.3 if biases else 1
        bound = TOLERANCE[dtype] * (factor if dtype == torch.bfloat16 else 1)
        for actual, wanted in zip(first, exact, strict=True):
            close(actual, wanted, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["SwiGLU", "GeGLU", "GELU"])
@pytest.mark.parametrize("columns", [768, 1408, 33])
def test_fused_activation(kind, columns, dtype):
    from megatron_xmoe.ops.activation import Activation

    gated = kind != "GELU"
    activation = Activation(torch.nn.functional.silu if kind == "SwiGLU" else torch.nn.functional.gelu, gated)
    hidden = torch.randn(1001, columns * (2 if gated else 1), device="cuda", dtype=dtype)
    weights, grad = torch.rand(1001, device="cuda"), torch.randn(1001, columns, device="cuda", dtype=dtype)
    assert activation.kind is not None and activation._fuses(hidden)
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    exact = hidden.double(), weights.double()
    results = [activation.forward(hidden, weights), *activation.backward(hidden, weights, grad.clone())]
    again = [activation.forward(hidden, weights), *activation.backward(hidden, weights, grad.clone())]
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    wanted = [activation.forward(*exact), *activation.backward(*exact, grad.double())]
    for actual, expected in zip(results, wanted, strict=True):
        assert (actual.double() - expected).norm() <= bound * expected.norm()
