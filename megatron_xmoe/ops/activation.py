"""What lies between the experts' two matrix products: the activation, times the routing weight of each row."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xmoe.kernels.registry import triton_is_usable

_FUSED = {F.silu: "silu", F.gelu: "gelu"}


@dataclass(frozen=True)
class Activation:
    """An activation function, with or without a gate. Computes in fp32 (fp64 for fp64).

    Letters: M rows, F columns of the second product's input. Without `gated` hidden is [M, F]; with it [M, 2F], and the
    result is function(first half) * (second half + offset).
    """

    function: Callable[[Tensor], Tensor]
    gated: bool

    limit: float | None = None
    """Clamps a gated hidden: the first half from above, the second on both sides."""

    offset: float = 0.0

    def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """The result times weights [M]: [M, F] in hidden's dtype. Not differentiable; see backward."""
        if self._fuses(hidden):
            from megatron_xmoe.kernels import triton_activation

            return triton_activation.activate(hidden.contiguous(), weights.contiguous(), self.kind, self.gated)
        with torch.no_grad():
            return self._by_torch(hidden, weights)

    def backward(self, hidden: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients, given that of the result, [M, F], which may be overwritten.

        Returns:
            gradient of hidden in its dtype; the result of `forward` again; gradient of weights [M] in their dtype.
        """
        if self._fuses(hidden):
            from megatron_xmoe.kernels import triton_activation

            grad_hidden, result, grad_weights = triton_activation.activate_backward(
                hidden.contiguous(), weights.contiguous(), grad.contiguous(), self.kind, self.gated
            )
            return grad_hidden, result, grad_weights.to(weights.dtype)
        with torch.enable_grad():
            leaves = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
            result = self._by_torch(*leaves)
        grad_hidden, grad_weights = torch.autograd.grad(result, leaves, grad)
        return grad_hidden, result.detach(), grad_weights

    def _by_torch(self, hidden: Tensor, weights: Tensor) -> Tensor:
        wide = hidden.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        if self.gated:
            gate, linear = wide.chunk(2, dim=-1)
            if self.limit is not None:
                gate, linear = gate.clamp(max=self.limit), linear.clamp(min=-self.limit, max=self.limit)
            value = self.function(gate) * (linear + self.offset)
        else:
            value = self.function(wide)
        return (value * weights.to(wide.dtype).unsqueeze(-1)).to(hidden.dtype)

    @property
    def kind(self) -> str | None:
        """The kernels' name of it, None where they cannot compute it.

        Megatron's squared_relu is known by its name, which only it has.
        """
        if self.limit is not None or self.offset:
            return None
        named = "squared_relu" if getattr(self.function, "__name__", "") == "squared_relu" else None
        return _FUSED.get(self.function, named)

    def _fuses(self, hidden: Tensor) -> bool:
        """Whether there is a kernel for it, here."""
        return self.kind is not None and hidden.is_cuda and hidden.dtype != torch.float64 and triton_is_usable("cuda")
