"""The experts' MLP with its gradients: fc1, activation times routing weight, fc2, over rows that may lie elsewhere.

Letters: R rows of the source, M rows in expert order, E experts, H hidden size, F FFN size, 2F with a gate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_xmoe.kernels.registry import kernel
from megatron_xmoe.ops.activation import Activation
from megatron_xmoe.ops.grouped_gemm import GroupedGemm, Groups
from megatron_xmoe.ops.rows import RowsSource, give_back_rows, take_rows


@dataclass(frozen=True)
class ExpertWeights:
    """The parameters of all local experts. Without biases both are None."""

    fc1: Tensor
    """[E, 2F, H] with a gate (its half first), else [E, F, H]."""

    fc2: Tensor
    """[E, H, F]."""

    bias1: Tensor | None = None
    """[E, 2F] or [E, F]."""

    bias2: Tensor | None = None
    """[E, H]; multiplied by the routing weight."""


@dataclass(frozen=True)
class _Plan:
    """What is not a tensor."""

    groups: Groups
    activation: Activation
    gemm: GroupedGemm
    recompute: bool
    into_main_grad: bool


def grouped_mlp(
    source: RowsSource,
    probs: Tensor,
    weights: ExpertWeights,
    groups: Groups,
    activation: Activation,
    gemm: GroupedGemm,
    recompute: bool = False,
    into_main_grad: bool = False,
) -> Tensor:
    """Apply the experts: fc2(activation(fc1(row) + bias1) * prob) + prob * bias2.

    Saves for backward the source's tensor, the pre-activation and the routing weights: 2d + 4Kn bytes a token in bf16
    with gated experts (d hidden size, n FFN size, K experts a token) where the source is the tokens themselves. The
    gathered rows and the activation are computed again.

    Args:
        source: rows [M, H], of each expert one after the other; any that follow are nobody's.
        probs: routing weights [M], any floating dtype.
        recompute: do not save the pre-activation either, but compute fc1 again: 2d bytes a token stay.
        into_main_grad: add the gradients of fc1 and fc2 to their attribute `main_grad`, in its dtype, where they have
            one, as Megatron's fused gradient accumulation does; what autograd then gets has no meaning.

    Returns:
        [M, H]. Differentiable in source.tensor, probs and weights, once.
    """
    plan = _Plan(groups, activation, gemm, recompute, into_main_grad)
    parameters = weights.fc1, weights.fc2, weights.bias1, weights.bias2
    return _GroupedMLP.apply(source.tensor, probs, *parameters, source.index, source.inverse, plan)


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, probs, weight1, weight2, bias1, bias2, index, inverse, plan):
        groups, gemm = plan.groups, plan.gemm
        if index is not None and gemm.gathers:
            hidden = _first_product(plan, tensor.contiguous(), weight1, bias1, index.contiguous())
        else:
            hidden = _first_product(plan, take_rows(tensor, index, inverse).contiguous(), weight1, bias1)
        activated = plan.activation.forward(hidden, probs)
        kept = None if plan.recompute else hidden
        ctx.save_for_backward(tensor, probs, weight1, weight2, bias1, bias2, index, inverse, kept)
        ctx.plan = plan
        del hidden
        output = gemm.multiply(activated, weight2, groups)
        if bias2 is not None:
            output += probs.unsqueeze(1) * bias2.index_select(0, groups.experts_of_rows(probs.shape[0]))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensor, probs, weight1, weight2, bias1, bias2, index, inverse, hidden = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # the pre-activation goes before the weights' gradients come
        plan, needed, grad = ctx.plan, ctx.needs_input_grad, grad.contiguous()
        groups, gemm = plan.groups, plan.gemm
        rows = grad_tensor = grad_weight1 = grad_weight2 = grad_bias1 = grad_bias2 = None
        if hidden is None:
            rows = take_rows(tensor, index, inverse).contiguous()
            hidden = _first_product(plan, rows, weight1, bias1)
        grad_activated = gemm.multiply(grad, weight2, groups, transposed=True)
        grad_hidden, activated, grad_probs = plan.activation.backward(hidden, probs, grad_activated)
        del hidden, grad_activated
        if needed[3]:
            grad_weight2 = _weight_gradient(plan, weight2, grad, activated)
        del activated
        if bias2 is not None:
            experts = groups.experts_of_rows(probs.shape[0]).unsqueeze(1)
            grad_probs += kernel("dot_rows", grad.device.type)(bias2, experts, grad).view_as(grad_probs)
            grad_bias2 = _bias_gradient(bias2, grad, probs, groups)
            grad_bias1 = _bias_gradient(bias1, grad_hidden, None, groups)
        if needed[2]:
            if rows is None:
                rows = take_rows(tensor, index, inverse).contiguous()
            grad_weight1 = _weight_gradient(plan, weight1, grad_hidden, rows)
        del rows
        if needed[0]:
            grad_rows = gemm.multiply(grad_hidden, weight1, groups, transposed=True)
            del grad_hidden
            grad_tensor = give_back_rows(grad_rows, index, inverse, tensor.shape[0])
            del grad_rows
        grad_weight1 = _for_autograd(weight1, grad_weight1, needed[2])
        grad_weight2 = _for_autograd(weight2, grad_weight2, needed[3])
        return grad_tensor, grad_probs, grad_weight1, grad_weight2, grad_bias1, grad_bias2, None, None, None


def _first_product(
    plan: _Plan, rows: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None = None
) -> Tensor:
    """The pre-activation."""
    if bias is None:
        return plan.gemm.multiply(rows, weight, plan.groups, index)
    return plan.gemm.multiply_add(rows, weight, bias, plan.groups, index)


def _bias_gradient(bias: Tensor, grad: Tensor, weights: Tensor | None, groups: Groups) -> Tensor:
    """Sums [E, N] over the rows of each expert of grad [M, N], times weights [M]."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    result = bias.new_empty(bias.shape)
    scales = grad.new_ones(grad.shape[0], dtype=wide) if weights is None else weights.to(wide)
    for out, part, scale in zip(result, groups.parts(grad), groups.parts(scales), strict=True):
        out.copy_(scale @ part.to(wide))
    return result


def _weight_gradient(plan: _Plan, weight: Tensor, grad: Tensor, rows: Tensor) -> Tensor | None:
    """The gradient of a weight; None where it was added to the weight's `main_grad`."""
    main_grad = getattr(weight, "main_grad", None) if plan.into_main_grad else None
    if main_grad is None:
        return plan.gemm.weight_gradient(grad, rows, plan.groups)
    plan.gemm.weight_gradient(grad, rows, plan.groups, into=main_grad)
    return None


def _for_autograd(weight: Tensor, grad: Tensor | None, needed: bool) -> Tensor | None:
    """The gradient, or what stands for one that was added to `main_grad`.

    Megatron's data parallelism is told by `grad_added_to_main_grad` that it must not add it again. Its hooks need a
    gradient all the same, whose memory nobody writes or reads; zeros where somebody does (`zero_out_wgrad`).
    """
    if grad is not None or not needed or not hasattr(weight, "grad_added_to_main_grad"):
        return grad
    weight.grad_added_to_main_grad = True
    stand_in = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return stand_in(weight.shape, dtype=weight.dtype, device=weight.device)
