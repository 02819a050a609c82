"""What a checkpoint's arguments and configuration say, where its tensors' shapes cannot tell."""

import json
import shutil
import subprocess
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make

from megatron_xmoe.checkpoint.convert import (
    ARGUMENTS,
    Options,
    checkpoint_arguments,
    hf_to_megatron,
    megatron_to_hf,
)
from megatron_xmoe.checkpoint.names import ConversionError
from megatron_xmoe.checkpoint.torch_dist import TorchDistReader


@pytest.fixture(scope="module")
def tinies(tmp_path_factory):
    """A model with usual attention and one with latent attention: name -> (HuggingFace, Megatron)."""
    folder, found = tmp_path_factory.mktemp("tinies"), {}
    for name in ("qwen3_moe", "deepseek_v3", "mixtral"):
        tiny = make(name, folder / name)
        hf_to_megatron(tiny.directory, folder / f"{name}-megatron", Options())
        found[name] = tiny.directory, folder / f"{name}-megatron"
    return found


def changed_config(source, folder, **changes):
    """A folder with a configuration only."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_neighbours_configuration_is_not_taken(tinies, tmp_path):
    hf, megatron = tinies["qwen3_moe"]
    shutil.copytree(hf, tmp_path / "hf")
    shutil.copytree(megatron, tmp_path / "runs", ignore=shutil.ignore_patterns("hf"))
    with pytest.raises(ConversionError, match="brings no HuggingFace configuration"):
        megatron_to_hf(tmp_path / "runs", tmp_path / "back", Options())
    report = megatron_to_hf(megatron / "release", tmp_path / "back", Options())
    assert f"configuration: {megatron.resolve() / 'hf' / 'config.json'}" in report.table()


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("mixtral", {"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4}, "num_attention_heads 4, .* 8"),
        ("qwen3_moe", {"rope_theta": 5000.0, "rope_parameters": None}, "rotary_base"),
        ("qwen3_moe", {"num_experts_per_tok": 3}, "moe_router_topk 2, .*leads to 3"),
        ("qwen3_moe", {"norm_topk_prob": False}, "moe_router_pre_softmax"),
        ("qwen3_moe", {"rms_norm_eps": 1e-5}, "layernorm_epsilon 1e-06, .*leads to 1e-05"),
        ("deepseek_v3", {"qk_nope_head_dim": 4, "v_head_dim": 16, "num_attention_heads": 4}, "qk_head_dim|v_head_dim"),
        ("deepseek_v3", {"routed_scaling_factor": 1.5}, "moe_router_topk_scaling_factor 2.5, .*leads to 1.5"),
    ],
)
def test_a_configuration_of_another_model_is_refused(name, changes, rule, tinies, tmp_path):
    hf, megatron = tinies[name]
    config = changed_config(hf, tmp_path / "config", **changes)
    with pytest.raises(ConversionError, match=f"was saved with .*{rule}"):
        megatron_to_hf(megatron, tmp_path / "back", Options(), config)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["rotary_interleaved", "use_rope_scaling", "qk_l2_norm", "quick_geglu"])
def test_what_a_run_was_saved_with_rebuilds_its_model(name, tinies, tmp_path, monkeypatch):
    """Options that change the model without a trace in its tensors."""
    _, megatron = tinies["mixtral"]
    (tmp_path / "saved").mkdir()
    shutil.copytree(megatron / "release", tmp_path / "saved" / "release")
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("release")
    common = TorchDistReader.common
    changes = {name: True, "moe_expert_capacity_factor": 1.5, "moe_apply_probs_on_input": True}
    changed = lambda self: {"args": Namespace(**(vars(common(self)["args"]) | changes))}  # noqa: E731
    monkeypatch.setattr(TorchDistReader, "common", changed)
    words = checkpoint_arguments(tmp_path / "saved")[0]
    assert {f"--{name.replace('_', '-')}", "--moe-apply-probs-on-input", "--moe-expert-capacity-factor"} <= set(words)
    with pytest.raises(ConversionError, match=f"{name} True"):
        megatron_to_hf(tmp_path / "saved", tmp_path / "back", Options(), tinies["mixtral"][0])


def test_the_line_of_arguments_is_the_same_in_a_shell(tinies, tmp_path):
    """Names of files that a list of layers would match as a pattern."""
    _, megatron = tinies["deepseek_v3"]
    for name in ("0", "1", "01", ","):
        (tmp_path / name).touch()
    line = (megatron / ARGUMENTS).read_text()
    seen = subprocess.run(["bash", "-c", f"echo $(cat {megatron / ARGUMENTS})"], cwd=tmp_path, capture_output=True)
    assert seen.stdout.decode() == line and "--moe-layer-freq ([0]*1+[1]*2)" in line


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
def test_a_value_too_large_for_a_data_type_is_refused(name, tinies, tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(tinies["deepseek_v3"][0], hf)
    path = hf / json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name].view(-1)[3] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=f"{name} holds 1e.05, which is infinite in float16"):
        hf_to_megatron(hf, tmp_path / "megatron", Options(dtype=torch.float16))
    hf_to_megatron(hf, tmp_path / "megatron", Options())
    with pytest.raises(ConversionError, match=f"{name} holds 1e.05, which is infinite in float16"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", Options(dtype=torch.float16))
    assert not (tmp_path / "back").exists()


def test_quantised_vectors_are_refused(tinies, tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(tinies["mixtral"][0], hf)
    config = json.loads((hf / "config.json").read_text()) | {"quantization_config": {"weight_block_size": [16, 16]}}
    (hf / "config.json").write_text(json.dumps(config))
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    path = hf / index["weight_map"]["model.norm.weight"]
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    tensors["model.norm.weight_scale_inv"] = torch.ones(2)
    index["weight_map"]["model.norm.weight_scale_inv"] = path.name
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, path)
    with pytest.raises(ConversionError, match="model.norm.weight is quantised and no matrix"):
        hf_to_megatron(hf, tmp_path / "megatron", Options())
