"""What is set for the user around the experts: bias-dropout-add and rotary embedding."""

from types import SimpleNamespace

import pytest

from megatron_xmoe.kernels import registry
from megatron_xmoe.training import setup
from megatron_xmoe.training.arguments import parse
from megatron_xmoe.training.defaults import adjust
from megatron_xmoe.training.rotary import Rotary, rotary_embedding

DROPOUT = "--no-bias-dropout-fusion"


def adjusted(monkeypatch, command: str, on_cpu: bool = False):
    """Arguments and the lines about them, as on a GPU; with backend xmoe, unless another is given."""
    monkeypatch.setattr("sys.argv", ["pretrain_xmoe.py", *f"--moe-backend xmoe --num-experts 4 {command}".split()])
    args, given, _ = parse()
    return args, adjust(args, given, on_cpu)


@pytest.mark.parametrize(
    ("command", "off"),
    [
        ("--disable-bias-linear --hidden-dropout 0", True),
        ("--disable-bias-linear --hidden-dropout 0.1", False),
        ("--hidden-dropout 0", False),
        # shared experts have no biases, so the linear layers lose theirs
        ("--hidden-dropout 0 --moe-shared-expert-intermediate-size 8", True),
        ("--disable-bias-linear --hidden-dropout 0 --moe-backend megatron", False),
    ],
)
def test_one_addition_is_not_compiled(monkeypatch, command, off):
    args, lines = adjusted(monkeypatch, command)
    assert args.bias_dropout_fusion is not off
    found = [line for line in lines if line.startswith(f"{DROPOUT}  (no biases and no dropout")]
    assert len(found) == int(off)


def test_an_option_of_the_users_is_not_listed(monkeypatch):
    _, lines = adjusted(monkeypatch, f"--disable-bias-linear --hidden-dropout 0 {DROPOUT}")
    assert not [line for line in lines if DROPOUT in line]


@pytest.mark.parametrize(
    ("command", "usable", "pinned", "ours", "text"),
    [
        ("", True, "auto", True, "fused by Triton, one launch a tensor"),
        ("--rotary-interleaved", True, "triton", True, "fused by Triton"),
        ("--moe-backend megatron", True, "auto", False, "Megatron's unfused function (backend megatron)"),
        ("--no-rope-fusion", True, "auto", False, "Megatron's unfused function (--no-rope-fusion)"),
        ("", True, "reference", False, "(plain torch is pinned)"),
        ("", False, "auto", False, "(no Triton kernel: a reason)"),
    ],
)
def test_which_rotary_embedding_is_used(monkeypatch, command, usable, pinned, ours, text):
    monkeypatch.setenv(registry.ENVIRONMENT, pinned)
    monkeypatch.setattr(registry, "_candidate", lambda name, device: registry.Candidate(name, usable, "a reason"))
    args, _ = adjusted(monkeypatch, f"--position-embedding-type rope {command}")
    assert args.apply_rope_fusion is False  # Megatron's switch means Transformer Engine's function
    found = rotary_embedding(args)
    assert found.ours is ours and text in found.text


def test_a_model_without_rotation_has_no_line(monkeypatch):
    args, _ = adjusted(monkeypatch, "--position-embedding-type learned_absolute")
    assert rotary_embedding(args) == (False, "")


@pytest.mark.parametrize("ours", [True, False])
def test_the_kernel_is_put_in_place_where_it_was_chosen(monkeypatch, ours):
    installed = []
    args, _ = adjusted(monkeypatch, "--position-embedding-type rope")
    monkeypatch.setattr(setup, "get_args", lambda: args)
    monkeypatch.setattr(setup, "apply_moe_backend", lambda *arguments: None)
    monkeypatch.setattr(setup, "rotary_embedding", lambda args: Rotary(ours, ""))
    monkeypatch.setattr(setup.rotary, "install", lambda: installed.append("rotary"))
    setup.use_backend(SimpleNamespace(transformer_layer_spec=None, post_wrap_hooks=[]), [], 0, 0)
    assert installed == ["rotary"] * ours
