"""What runs around the experts without Transformer Engine, on a GPU: rotary embedding, clipping, bias-dropout-add.

Not run by CI, which has no GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from tolerances import assert_same, relative_rms_error

from megatron_xmoe.kernels.registry import triton_is_usable
from megatron_xmoe.platform import rotary
from megatron_xmoe.platform.patching import apply

pytestmark = pytest.mark.gpu
ORDERS = {"halves": (False, False), "interleaved": (True, False), "latent": (False, True)}
# S, B, N, D, R
SHAPES = {
    "model": (2048, 4, 16, 128, 128),
    "part of a head": (257, 3, 5, 80, 50),
    "one head": (300, 2, 1, 64, 64),
    "wide": (33, 1, 7, 576, 512),
    "one position": (1, 1, 128, 128, 128),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def installed(monkeypatch):
    """The fused rotary embedding in Megatron's function; gives the unfused one."""
    assert triton_is_usable("cuda"), "Triton has to run here: see python -m megatron_xmoe.info"
    original = rope_utils._apply_rotary_pos_emb_bshd
    original = getattr(original, "_megatron_xmoe_original", original)
    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", original)
    apply(rotary.REPLACEMENTS)
    return original


def inputs(S, B, N, D, R, dtype, first=0):
    """A view of a fused projection, angles as Megatron makes them, and a gradient laid out as attention's."""
    generator = torch.Generator().manual_seed(S)
    whole = torch.randn(S, B, N, 3 * D, generator=generator).to("cuda", dtype)
    frequencies = 1 / 10000 ** (torch.arange(0, R, 2, device="cuda") / R)
    angles = torch.outer(torch.arange(first, first + S, device="cuda").float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]
    grad = torch.randn(B, N, S, D, generator=generator).to("cuda", dtype).permute(2, 0, 1, 3)
    return whole[..., D : 2 * D], angles, grad


def with_gradient(function, x, angles, order, scale, grad):
    """Result and gradient of x."""
    leaf = x.detach().requires_grad_()
    result = function(leaf, angles, *ORDERS[order], mscale=scale)
    return result.detach(), torch.autograd.grad(result, leaf, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_is_at_least_as_good_as_the_unfused(installed, shape, order, dtype):
    for first, scale in ((0, 1.0), (1_000_000, 1.25)):
        x, angles, grad = inputs(*SHAPES[shape], dtype, first)
        exact = with_gradient(installed, x.double(), angles.double(), order, scale, grad.double())
        unfused = with_gradient(installed, x, angles, order, scale, grad)
        found = with_gradient(rope_utils._apply_rotary_pos_emb_bshd, x, angles, order, scale, grad)
        again = with_gradient(rope_utils._apply_rotary_pos_emb_bshd, x, angles, order, scale, grad)
        for ours, theirs, truth, repeated in zip(found, unfused, exact, again, strict=True):
            assert_same(ours, repeated)
            assert ours.dtype == dtype and ours.is_contiguous()
            error, bound = relative_rms_error(ours, truth), relative_rms_error(theirs, truth)
            assert error <= (1e-6 if dtype == torch.float32 else bound), f"{error:.3g}, unfused {bound:.3g}"
        assert_same(found[0][..., SHAPES[shape][4] :], x[..., SHAPES[shape][4] :])


def test_one_launch_each_way(installed):
    from torch.profiler import ProfilerActivity, profile

    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    x, angles, grad = inputs(*SHAPES["model"], torch.bfloat16)
    leaf = x.detach().requires_grad_()

    def both_ways():
        torch.autograd.grad(rope_utils.apply_rotary_pos_emb(leaf, angles, config, cp_group=object()), leaf, grad)

    both_ways()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        both_ways()
        torch.cuda.synchronize()
    assert {event.key: event.count for event in profiled.key_averages() if event.device_time_total} == {
        "rotate_kernel": 2
    }


def test_norm_and_scaling_do_not_wait_for_the_gpu():
    from megatron.core.optimizer import clip_grads

    local = clip_grads.l2_norm_impl._megatron_xmoe_original, clip_grads.multi_tensor_scale_impl._megatron_xmoe_original
    shapes = ((2048, 6144), (3,), (0, 4), (50304, 512), (1,), *((64, 64),) * 400)
    grads = [torch.randn(shape, device="cuda") for shape in shapes]
    expected, _ = local[0](65536, None, [grads], False)
    scaled = [torch.empty_like(grad) for grad in grads]
    local[1](65536, None, [grads, scaled], 0.3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm, _ = clip_grads.l2_norm_impl(65536, None, [grads], False)
        again, _ = clip_grads.l2_norm_impl(65536, None, [grads], False)
        clip_grads.multi_tensor_scale_impl(65536, None, [grads, grads], 0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(norm, again)
    torch.testing.assert_close(norm, expected, rtol=2e-6, atol=0)
    for grad, other in zip(grads, scaled, strict=True):
        assert_same(grad, other)


def test_the_addition_without_compiling_gives_the_same_bits():
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    x, residual, grad = (torch.randn(64, 4, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    found = []
    for fused in (True, False):
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        result = get_bias_dropout_add(True, fused)((leaves[0], None), leaves[1], 0.0)
        found.append([result.detach(), *torch.autograd.grad(result, leaves, grad)])
    for compiled, plain in zip(*found, strict=True):
        assert_same(compiled, plain)
