"""The activation between the experts' products against plain formulas in float64, with every gradient."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

from megatron_xmoe.ops.activation import Activation


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


# name -> (activation, the same in other words)
CASES = {
    "SwiGLU": (Activation(F.silu, True), lambda h: h.chunk(2, -1)[0] * h.chunk(2, -1)[0].sigmoid() * h.chunk(2, -1)[1]),
    "GeGLU": (Activation(F.gelu, True), lambda h: F.gelu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]),
    "GELU": (Activation(F.gelu, False), lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5))),
    "squared ReLU": (Activation(squared_relu, False), lambda h: h.clamp_min(0) ** 2),
    "clamped": (
        Activation(F.silu, True, limit=0.5, offset=1.0),
        lambda h: F.silu(h.chunk(2, -1)[0].clamp(max=0.5)) * (h.chunk(2, -1)[1].clamp(-0.5, 0.5) + 1),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients(name, rows, dtype):
    activation, formula = CASES[name]
    hidden, weights = torch.randn(rows, 2 * 7).to(dtype), torch.randn(rows)
    if dtype == torch.float64:
        weights = weights.double()
    exact = hidden.double().requires_grad_(), weights.double().requires_grad_()
    expected = formula(exact[0]) * exact[1].unsqueeze(1)
    grad = torch.randn(expected.shape).to(dtype)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())

    assert_close(activation.forward(hidden, weights), expected)
    grad_hidden, again, grad_weights = activation.backward(hidden, weights, grad.clone())
    assert (grad_hidden.dtype, again.dtype, grad_weights.dtype) == (dtype, dtype, weights.dtype)
    assert_close(grad_hidden, expected_grads[0])
    assert_close(again, expected)
    assert_close(grad_weights, expected_grads[1])
