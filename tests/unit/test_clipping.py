"""Norms and clipping of many tensors at once, against Megatron's own functions for a machine without fused ones."""

from types import SimpleNamespace

import harness
import pytest
import torch
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from megatron.training.utils import common_utils
from tolerances import assert_same

from megatron_xmoe.platform import multi_tensor
from megatron_xmoe.platform.patching import Replacement, apply

PLACES = (
    (clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm),
    (common_utils, "multi_tensor_l2norm", local_multi_tensor_l2_norm),
    (clip_grads, "multi_tensor_scale_impl", local_multi_tensor_scale),
    (optimizer, "multi_tensor_scale_impl", local_multi_tensor_scale),
)


@pytest.fixture
def parameters():
    """Parameters of several shapes with gradients, one of them empty."""
    shapes = ((3, 5), (1,), (0, 4), (2000,), (7, 1, 9))
    made = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for number, parameter in enumerate(made):
        parameter.grad = torch.randn(parameter.shape) * 10.0 ** (number - 2)
    return made


def test_they_are_in_place():
    for module, name, original in PLACES:
        assert getattr(module, name)._megatron_xmoe_original is original


def clipped(parameters, stock: bool, max_norm: float, monkeypatch) -> tuple[float, list[torch.Tensor]]:
    """Norm and clipped gradients by Megatron's functions, with its own implementations or with ours."""
    copies = [torch.nn.Parameter(parameter.detach()) for parameter in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = parameter.grad.clone()
    with monkeypatch.context() as patch:
        if stock:
            patch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
            patch.setattr(clip_grads, "multi_tensor_scale_impl", local_multi_tensor_scale)
        norm = clip_grads.get_grad_norm_fp32([copy.grad for copy in copies])
        clip_grads.clip_grad_by_total_norm_fp32(copies, max_norm, norm)
    return norm, [copy.grad for copy in copies]


@pytest.mark.parametrize("max_norm", [1.0, 1e6], ids=["clipped", "within the norm"])
def test_clipping_equals_stock(parameters, max_norm, monkeypatch):
    with harness.single_process():
        expected, expected_grads = clipped(parameters, True, max_norm, monkeypatch)
        norm, grads = clipped(parameters, False, max_norm, monkeypatch)
    assert norm == pytest.approx(expected, rel=1e-6)
    for grad, other, parameter in zip(grads, expected_grads, parameters, strict=True):
        torch.testing.assert_close(grad, other, rtol=2e-6, atol=0)
        assert torch.equal(grad, parameter.grad) == (max_norm == 1e6 or grad.numel() == 0)


def test_a_tensor_is_scaled_as_by_stock_bit_for_bit(parameters):
    grads = [parameter.grad for parameter in parameters]
    expected = [torch.empty_like(grad) for grad in grads]
    local_multi_tensor_scale(65536, None, [grads, expected], 0.3)
    clip_grads.multi_tensor_scale_impl(65536, None, [grads, grads], 0.3)
    for grad, other in zip(grads, expected, strict=True):
        assert_same(grad, other)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_other_targets_than_the_sources(parameters, factor):
    """As the optimizer for 16 bits copies its fp32 parameters into the model's."""
    sources = [parameter.grad for parameter in parameters]
    before = [source.clone() for source in sources]
    targets, expected = ([torch.empty_like(s, dtype=torch.bfloat16) for s in sources] for _ in range(2))
    local_multi_tensor_scale(65536, None, [sources, expected], factor)
    optimizer.multi_tensor_scale_impl(65536, None, [sources, targets], factor)
    for found, other, source, kept in zip(targets, expected, sources, before, strict=True):
        assert_same(found, other)
        assert_same(source, kept)


def test_nothing_to_do():
    norm, _ = clip_grads.l2_norm_impl(65536, None, [[]], False)
    assert norm.tolist() == [0.0]
    clip_grads.multi_tensor_scale_impl(65536, None, [[], []], 0.5)


def test_the_norm_of_several_lists_and_of_16_bits():
    tensors = [torch.randn(100), torch.randn(50).bfloat16()]
    for lists in ([tensors], [tensors[:1], tensors[1:]]):
        found, nothing = common_utils.multi_tensor_l2norm(65536, None, lists, False)
        expected, _ = local_multi_tensor_l2_norm(65536, None, [tensors], False)
        assert nothing is None and found.shape == (1,) and found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_no_number_is_read_from_the_device(parameters, monkeypatch):
    def read(self):
        raise AssertionError("waits for the device")

    monkeypatch.setattr(torch.Tensor, "item", read)
    monkeypatch.setattr(torch.Tensor, "__float__", read)
    grads = [parameter.grad for parameter in parameters]
    clip_grads.l2_norm_impl(65536, None, [grads], False)
    clip_grads.multi_tensor_scale_impl(65536, None, [grads, grads], 0.5)


def test_fused_functions_of_others_stay(monkeypatch):
    """Those of Transformer Engine and Apex, which may be built-in functions that take no attribute."""
    place = SimpleNamespace(function=len)
    monkeypatch.setitem(__import__("sys").modules, "module_of_a_test", place)
    for made in multi_tensor.REPLACEMENTS:
        assert apply([Replacement("module_of_a_test:function", made.make, made.why)]) == 0
        assert place.function is len
