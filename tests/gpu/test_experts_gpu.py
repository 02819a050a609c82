"""torch's grouped_mm behind the grouped experts, on a GPU it supports: outputs and gradients against a loop in fp64."""

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
