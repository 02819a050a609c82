"""The fused rotary embedding in Triton's interpreter, against Megatron's unfused function in float64."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from tolerances import assert_close, assert_same

from megatron_xmoe.ops import rotary
from megatron_xmoe.platform import rotary as fused
from megatron_xmoe.platform.patching import apply

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ORDERS = {"halves": (False, False), "interleaved": (True, False), "latent": (False, True)}
# S, B, N, D, R
SHAPES = {
    "whole head": (5, 2, 3, 16, 16),
    "part of a head": (4, 3, 2, 24, 10),
    "one head": (70, 1, 1, 8, 8),
    "one pair": (3, 2, 4, 5, 2),
    "many heads": (2, 1, 37, 12, 6),
}


def view_of_projection(S, B, N, D, dtype=torch.float32):
    """Heads as Megatron's attention has them: a part of every group of one projection."""
    generator = torch.Generator().manual_seed(S + N)
    whole = torch.randn(S, B, N, 3 * D, generator=generator, dtype=torch.float64).to(dtype)
    return whole[..., D : 2 * D]


def angles_of(S, B, R, first=0):
    """As Megatron makes them, but the two halves differ, and one in three positions is far away."""
    positions = torch.arange(first, first + S) * torch.tensor([1, 1, 700]).repeat(S // 3 + 1)[:S]
    angles = positions[:, None] / 10000 ** (torch.arange(R) / max(R, 1))[None, :]
    return (angles[:, None, None, :] + torch.arange(B)[None, :, None, None]).float()


def by_megatron(x, angles, order, scale, grad):
    """Result and gradient of the unfused function, in float64."""
    unfused = getattr(rope_utils._apply_rotary_pos_emb_bshd, "_megatron_xmoe_original", None)
    unfused = unfused or rope_utils._apply_rotary_pos_emb_bshd
    exact = x.double().requires_grad_()
    result = unfused(exact, angles.double(), *ORDERS[order], mscale=scale)
    (gradient,) = torch.autograd.grad(result, exact, grad.double())
    return result.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
def test_kernel_equals_megatrons_unfused_function(interpreted, order, shape, dtype):
    S, B, N, D, R = SHAPES[shape]
    interleaved, latent = ORDERS[order]
    x = view_of_projection(S, B, N, D, dtype)
    grad = torch.randn(B, N, S, D).to(dtype).permute(2, 0, 1, 3)  # as attention gives it
    for batch, scale in ((1, 1.0), (B, 1.25)):
        angles = angles_of(S, batch, R)
        expected, gradient = by_megatron(x, angles, order, scale, grad)
        how = interleaved or latent, interleaved, scale
        for found, exact in (
            (interpreted("triton_rotary", "rotate", x, angles, *how), expected),
            (interpreted("triton_rotary", "rotate", grad, angles, *how, True), gradient),
        ):
            assert found.dtype == dtype and found.is_contiguous() and found.shape == x.shape
            bound = (1e-6, 1e-6) if dtype == torch.float32 else (2**-7, 1e-6)  # the interpreter cuts bf16 off
            torch.testing.assert_close(found.double(), exact, rtol=bound[0], atol=bound[1])
        assert_same(interpreted("triton_rotary", "rotate", x, angles, *how)[..., R:], x[..., R:])


def test_nothing_to_rotate(interpreted):
    for shape in ((0, 2, 3, 16), (4, 0, 3, 16), (4, 2, 0, 16)):
        x, angles = torch.randn(shape), angles_of(shape[0], 1, 16)
        assert interpreted("triton_rotary", "rotate", x, angles, False, False).shape == shape


def test_columns_need_not_be_neighbours(interpreted):
    x, angles = torch.randn(4, 2, 8, 3).transpose(2, 3), angles_of(4, 1, 6)
    strided = torch.empty(4, 1, 1, 12)[..., ::2].copy_(angles)
    for order in ORDERS:
        expected, _ = by_megatron(x, angles, order, 1.0, torch.ones_like(x))
        interleaved, latent = ORDERS[order]
        assert_close(interpreted("triton_rotary", "rotate", x, strided, interleaved or latent, interleaved), expected)


@pytest.fixture
def everywhere(interpreted, monkeypatch):
    """The replacement in place, and the kernel taken for tensors on the CPU as well; counts its calls."""
    from megatron_xmoe.kernels import triton_rotary

    calls = []

    def rotate(*args, backward=False):
        calls.append(backward)
        return interpreted("triton_rotary", "rotate", *args, backward)

    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", rope_utils._apply_rotary_pos_emb_bshd)
    apply(fused.REPLACEMENTS)
    monkeypatch.setattr(fused, "fuses", rotary._fits)
    monkeypatch.setattr(triton_rotary, "rotate", rotate)
    return calls


def config(**changes):
    wanted = {"apply_rope_fusion": False, "rotary_interleaved": False, "multi_latent_attention": False}
    return SimpleNamespace(**wanted | changes)


@pytest.mark.parametrize("order", ORDERS)
def test_megatrons_attention_gets_it(everywhere, order):
    interleaved, latent = ORDERS[order]
    x, angles = view_of_projection(6, 2, 3, 16), angles_of(6, 1, 8)
    grad = torch.randn(6, 2, 3, 16)
    leaf = x.detach().clone().requires_grad_()
    found = rope_utils.apply_rotary_pos_emb(
        leaf,
        angles,
        config(rotary_interleaved=interleaved),
        mscale=1.5,
        cp_group=object(),
        mla_rotary_interleaved=latent,
    )
    (gradient,) = torch.autograd.grad(found, leaf, grad)
    assert everywhere == [False, True]
    expected, exact = by_megatron(x, angles, order, 1.5, grad)
    assert_close(found, expected)
    assert_close(gradient, exact)


def test_packed_sequences_get_it_one_by_one(everywhere):
    x, angles = view_of_projection(9, 1, 3, 16)[:, 0], angles_of(5, 1, 16)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    found = rope_utils.apply_rotary_pos_emb(x, angles, config(), bounds, cp_group=group)
    assert everywhere == [False, False]
    for begin, end in ((0, 4), (4, 9)):
        part = x[begin:end, None]
        expected, _ = by_megatron(part, angles[: end - begin], "halves", 1.0, torch.ones_like(part))
        assert_close(found[begin:end, None], expected)


@pytest.mark.parametrize(
    "case",
    {
        "float64": lambda x, angles: (x.double(), angles),
        "angles in float64": lambda x, angles: (x, angles.double()),
        "angles of one position": lambda x, angles: (x, angles[:1]),
        "angles of every head": lambda x, angles: (x, angles.expand(-1, -1, 3, -1)),
        "three dimensions": lambda x, angles: (x[:, 0], angles[:, 0]),
        "angles with a gradient": lambda x, angles: (x, angles.clone().requires_grad_()),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_the_kernel_does_not_take_stays_megatrons(everywhere, case):
    x, angles = case[1](view_of_projection(4, 2, 3, 8), angles_of(4, 1, 8))
    found = rope_utils._apply_rotary_pos_emb_bshd(x, angles)
    original = rope_utils._apply_rotary_pos_emb_bshd._megatron_xmoe_original
    assert_same(found, original(x, angles))
    assert not everywhere


def test_both_interleavings_at_once_stay_megatrons(everywhere):
    x, angles = view_of_projection(4, 2, 3, 8), angles_of(4, 1, 8)
    rope_utils._apply_rotary_pos_emb_bshd(x, angles, True, True)
    assert not everywhere


def test_tensors_on_the_cpu_stay_megatrons():
    x, angles = view_of_projection(4, 2, 3, 8), angles_of(4, 1, 8)
    assert rotary._fits(x, angles) and not rotary.fuses(x, angles)
