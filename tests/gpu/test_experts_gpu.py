"""Parts of the grouped experts on a GPU, against fp64: torch's grouped_mm, and the fused activation."""

import pytest
import torch

pytestmark = pytest.mark.gpu
SIZES = {"uneven": [5, 0, 130, 1, 64, 0, 0, 17], "none": [0] * 8, "all to one": [0, 0, 0, 300, 0, 0, 0, 0]}


@pytest.mark.parametrize("sizes", SIZES)
def test_products_and_weight_gradients(sizes):
    from megatron_xmoe.ops.grouped_gemm import Groups, multiply, weight_gradient

    counts = torch.tensor(SIZES[sizes])
    groups = Groups.of(counts, torch.device("cuda"))
    rows = torch.randn(int(counts.sum()), 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(8, 192, 128, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(rows.shape[0], 192, device="cuda", dtype=torch.bfloat16)
    torch.full((64 << 20,), float("nan"), device="cuda")  # freed at once: memory that nothing wrote holds NaN
    pairs = [
        (multiply(rows, weight, groups, grouped=True), multiply(rows.double(), weight.double(), groups, False)),
        (multiply(grad, weight.transpose(1, 2), groups, grouped=True),
         multiply(grad.double(), weight.transpose(1, 2).double(), groups, False)),
        (weight_gradient(grad, rows, groups, grouped=True),
         weight_gradient(grad.double(), rows.double(), groups, False)),
    ]  # fmt: skip
    for actual, expected in pairs:
        assert actual.shape == expected.shape and torch.isfinite(actual).all()
        assert (actual.double() - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["SwiGLU", "GeGLU", "GELU"])
@pytest.mark.parametrize("columns", [768, 1408, 33])
def test_fused_activation(kind, columns, dtype):
    from megatron_xmoe.ops.activation import Activation

    gated = kind != "GELU"
    activation = Activation(torch.nn.functional.silu if kind == "SwiGLU" else torch.nn.functional.gelu, gated)
    hidden = torch.randn(1001, columns * (2 if gated else 1), device="cuda", dtype=dtype)
    weights, grad = torch.rand(1001, device="cuda"), torch.randn(1001, columns, device="cuda", dtype=dtype)
    assert activation._fuses(hidden)
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    exact = hidden.double(), weights.double()
    results = [activation.forward(hidden, weights), *activation.backward(hidden, weights, grad.clone())]
    again = [activation.forward(hidden, weights), *activation.backward(hidden, weights, grad.clone())]
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    wanted = [activation.forward(*exact), *activation.backward(*exact, grad.double())]
    for actual, expected in zip(results, wanted, strict=True):
        assert (actual.double() - expected).norm() <= bound * expected.norm()
