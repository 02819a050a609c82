"""What is set for the user around the experts: bias-dropout-add, added gradients and rotary embedding."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_xmoe import _optional
from megatron_xmoe.kernels import registry
from megatron_xmoe.training import setup
from megatron_xmoe.training.arguments import parse
from megatron_xmoe.training.defaults import adjust
from megatron_xmoe.training.rotary import Rotary, rotary_embedding

ROOT = Path(__file__).resolve().parents[2]
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
        # stock commands have it, because Megatron does not start without: it means Transformer Engine's function
        ("--no-rope-fusion", True, "auto", True, "fused by Triton"),
        ("--xmoe-rope-fusion off", True, "auto", False, "Megatron's unfused function (--xmoe-rope-fusion off)"),
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


@pytest.mark.parametrize(
    ("command", "ours", "text"),
    [
        ("", False, "fused by Transformer Engine"),
        ("--xmoe-rope-fusion off", False, "fused by Transformer Engine"),
        ("--no-rope-fusion", True, "fused by Triton"),
        ("--no-rope-fusion --xmoe-rope-fusion off", False, "(--xmoe-rope-fusion off)"),
        ("--no-rope-fusion --moe-backend megatron", False, "(backend megatron)"),
    ],
)
def test_which_rotary_embedding_is_used_with_transformer_engine(monkeypatch, command, ours, text):
    monkeypatch.setattr(registry, "_candidate", lambda name, device: registry.Candidate(name, True, ""))
    monkeypatch.setattr(_optional, "transformer_engine", lambda: _optional.Availability("te", True, "2.0"))
    args, _ = adjusted(monkeypatch, f"--position-embedding-type rope {command}")
    assert args.apply_rope_fusion is ("--no-rope-fusion" not in command)
    found = rotary_embedding(args)
    assert found.ours is ours and text in found.text


@pytest.mark.parametrize("of_megatron", ["", "--no-gradient-accumulation-fusion"])
@pytest.mark.parametrize(("asked", "expected"), [("", "on"), ("auto", "on"), ("on", "on"), ("off", "off")])
def test_experts_add_their_gradients_unless_they_are_told_not_to(monkeypatch, of_megatron, asked, expected):
    """Stock commands switch Megatron's fusion off where Apex is missing; that is no word about X-MoE's."""
    option = f"--xmoe-gradient-accumulation-fusion {asked}" if asked else ""
    args, _ = adjusted(monkeypatch, f"{of_megatron} {option}")
    assert args.xmoe_gradient_accumulation_fusion == expected


def test_the_benchmark_of_both_backends_is_a_stock_command_with_our_kernels(monkeypatch, tmp_path):
    """What tools/benchmark_pretrain.sh starts, written down by a stand-in for Python."""
    (tmp_path / "python").write_text('#!/bin/sh\ncase "$*" in *pretrain_xmoe.py*) echo "$@" >> "$WORDS";; esac\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "WORDS": str(tmp_path / "words")}
    subprocess.run(["bash", ROOT / "tools" / "benchmark_pretrain.sh", "--gpus", "4"], env=environment, check=True)
    of_megatron, ours = [line.split(" pretrain_xmoe.py ")[1] for line in (tmp_path / "words").read_text().splitlines()]
    assert of_megatron.replace("--moe-backend megatron", "--moe-backend xmoe") == ours != of_megatron
    needed = "transformer-impl no-persist-layer-norm no-gradient-accumulation-fusion no-rope-fusion"
    assert {f"--{name}" for name in f"{needed} no-masked-softmax-fusion".split()} < set(ours.split())
    monkeypatch.setattr(registry, "_candidate", lambda name, device: registry.Candidate(name, True, ""))
    args, lines = adjusted(monkeypatch, ours)
    assert not [line for line in lines if "Transformer Engine" in line]  # all that it demands was given
    assert args.xmoe_gradient_accumulation_fusion == "on" and rotary_embedding(args).ours


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
