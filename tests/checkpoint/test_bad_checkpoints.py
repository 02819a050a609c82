"""Two hundred spoilt checkpoints: each ends with a named error, leaves nothing behind and runs no code."""

import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import original_xmoe
import pytest
import torch
from jobs import REPOSITORY
from safetensors.torch import load_file, save_file
from tiny_models import make

from megatron_xmoe.checkpoint.convert import Options, hf_to_megatron

sys.path.insert(0, str(REPOSITORY / "tools"))

import convert_checkpoint  # noqa: E402
from command_line import run_tool  # noqa: E402

CASES_PER_KIND = 10
WRONG_VALUES = [
    ("num_local_experts", 5), ("hidden_size", 48), ("num_hidden_layers", 4), ("vocab_size", 64), ("head_dim", 8),
    ("num_key_value_heads", 4), ("moe_intermediate_size", 8), ("model_type", "gpt2"), ("hidden_act", "gelu"),
    ("num_hidden_layers", -1), ("num_attention_heads", "four"), ("intermediate_size", 40),
    *((name, value) for value in (0, None) for name in (
        "decoder_sparse_step", "num_experts_per_tok", "num_hidden_layers", "vocab_size", "moe_intermediate_size",
        "rms_norm_eps", "max_position_embeddings", "hidden_size")),
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A good checkpoint of each format."""
    folder = tmp_path_factory.mktemp("good")
    tiny = make("qwen3_moe", folder / "hf")
    hf_to_megatron(tiny.directory, folder / "megatron", Options())
    original_xmoe.save(original_xmoe.random_model(), folder / "xmoe")
    return {kind: folder / kind for kind in ("hf", "megatron", "xmoe")}


class Touch:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.open, (self.path, os.O_CREAT)


def shard_with_experts(folder: Path, rng: random.Random) -> tuple[Path, str]:
    """A shard and one of its experts' matrices."""
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = rng.choice([name for name in weights if ".experts." in name])
    return folder / weights[name], name


def edit_shard(folder: Path, rng: random.Random, change: Callable[[dict, str], None]) -> str:
    """Change a shard's tensors, and the index with them; returns the tensor's name."""
    path, name = shard_with_experts(folder, rng)
    tensors = load_file(path)
    before = set(tensors)
    change(tensors, name)
    save_file(tensors, path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for lost in before - set(tensors):
        del content["weight_map"][lost]
    content["weight_map"] |= dict.fromkeys(tensors, path.name)
    index.write_text(json.dumps(content))
    return name


def hf_missing(folder, rng, mark):
    return edit_shard(folder, rng, lambda tensors, name: tensors.pop(name))


def hf_extra(folder, rng, mark):
    extra = f"model.layers.{rng.randrange(3)}.mlp.experts.0.gate_proj.bias"
    edit_shard(folder, rng, lambda tensors, name: tensors.update({extra: torch.zeros(16)}))
    return extra


def hf_wrong_shape(folder, rng, mark):
    def change(tensors, name):
        shape = tensors[name].shape
        new = rng.choice([(shape[0] + 1, shape[1]), (shape[1], shape[0]), (shape[0],), (*shape, 1)])
        tensors[name] = torch.zeros(new)

    return edit_shard(folder, rng, change)


def hf_renamed_expert(folder, rng, mark):
    def change(tensors, name):
        tensors[name.replace(".experts.", ".experts.1")] = tensors.pop(name)

    return edit_shard(folder, rng, change)


def hf_cut(folder, rng, mark):
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    cut(path, rng)
    return path.name


def hf_lost_shard(folder, rng, mark):
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    path.unlink()
    return path.name


def hf_index_elsewhere(folder, rng, mark):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = rng.choice(sorted(content["weight_map"]))
    content["weight_map"][name] = rng.choice(["../secret.safetensors", "/etc/passwd", 7, None, "other.safetensors"])
    index.write_text(json.dumps(content))
    return name if content["weight_map"][name] != "other.safetensors" else "other.safetensors"


def hf_wrong_config(folder, rng, mark):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key, value = rng.choice(WRONG_VALUES)
    path.write_text(json.dumps(config | {key: value}))
    return "config.json"


def hf_cut_json(folder, rng, mark):
    path = folder / rng.choice(["config.json", "model.safetensors.index.json"])
    cut(path, rng)
    return path.name


def hf_experts_swapped_dtype(folder, rng, mark):
    def change(tensors, name):
        tensors[name] = tensors[name].half()

    return edit_shard(folder, rng, change)


def megatron_cut(folder, rng, mark):
    path = rng.choice(sorted((folder / "release").glob("*.distcp")))
    cut(path, rng)
    return path.name


def megatron_cut_metadata(folder, rng, mark):
    cut(folder / "release" / ".metadata", rng)
    return ".metadata"


def edit_metadata(folder: Path, change: Callable) -> str:
    """Change the index of a torch_dist checkpoint."""
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    name = change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return name


def weights_in(metadata) -> list[str]:
    """Names of the model's tensors."""
    return sorted(name for name, item in metadata.state_dict_metadata.items() if hasattr(item, "chunks"))


def megatron_missing(folder, rng, mark):
    def change(metadata):
        name = rng.choice(weights_in(metadata))
        del metadata.state_dict_metadata[name]
        return name

    return edit_metadata(folder, change)


def megatron_renamed(folder, rng, mark):
    def change(metadata):
        name = rng.choice(weights_in(metadata))
        metadata.state_dict_metadata[f"{name}_old"] = metadata.state_dict_metadata.pop(name)
        return name

    return edit_metadata(folder, change)


def megatron_lost_chunk(folder, rng, mark):
    def change(metadata):
        name = rng.choice([name for name in weights_in(metadata) if "experts" in name])
        metadata.state_dict_metadata[name].chunks.pop(rng.randrange(4))
        return name

    return edit_metadata(folder, change)


def megatron_malicious(folder, rng, mark):
    content = rng.choice([Touch(mark), {"state_dict_metadata": Touch(mark)}, [Touch(mark)]])
    (folder / "release" / ".metadata").write_bytes(pickle.dumps(content, protocol=rng.randrange(2, 6)))
    return ".metadata"


def megatron_tracker(folder, rng, mark):
    tracker = folder / "latest_checkpointed_iteration.txt"
    tracker.write_text(rng.choice(["7", "", "-3", "../../etc", "seven"]))
    return "iter_0000007" if tracker.read_text() == "7" else tracker.name


def some_expert_file(folder, rng) -> Path:
    return rng.choice(sorted((folder / "global_step7").glob("layer_*.pt")))


def xmoe_missing_expert(folder, rng, mark):
    path = some_expert_file(folder, rng)
    path.unlink()
    return path.name.split("_mp_rank")[0]


def xmoe_renamed_expert(folder, rng, mark):
    path = some_expert_file(folder, rng)
    state = {name.replace("deepspeed_experts.", "deepspeed_experts.1"): t for name, t in torch.load(path).items()}
    torch.save(state, path)
    return path.name


def xmoe_cut(folder, rng, mark):
    path = rng.choice(sorted((folder / "global_step7").glob("*.pt")))
    cut(path, rng)
    return path.name


def xmoe_wrong_shape(folder, rng, mark):
    path = some_expert_file(folder, rng)
    state = torch.load(path)
    name = rng.choice([name for name in state if name.endswith("weight")])
    state[name] = state[name][: rng.randrange(1, 20), : rng.randrange(1, 20)].clone()
    torch.save(state, path)
    return path.name.split("_mp_rank")[0]


def xmoe_malicious(folder, rng, mark):
    path = rng.choice(sorted((folder / "global_step7").glob("*.pt")))
    torch.save(rng.choice([Touch(mark), {"module": Touch(mark)}, [Touch(mark)]]), path)
    return path.name


def cut(path: Path, rng: random.Random) -> None:
    """Keep the beginning of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) - 1)])


SPOILERS = {
    "hf": [hf_missing, hf_extra, hf_wrong_shape, hf_renamed_expert, hf_cut, hf_lost_shard, hf_index_elsewhere,
           hf_wrong_config, hf_cut_json, hf_experts_swapped_dtype],
    "megatron": [megatron_cut, megatron_cut_metadata, megatron_missing, megatron_renamed, megatron_lost_chunk,
                 megatron_malicious, megatron_tracker],
    "xmoe": [xmoe_missing_expert, xmoe_renamed_expert, xmoe_cut, xmoe_wrong_shape, xmoe_malicious],
}  # fmt: skip
COMMANDS = {"hf": ("hf-to-megatron", "--hf", "--megatron"), "megatron": ("megatron-to-hf", "--megatron", "--hf"),
            "xmoe": ("xmoe-to-megatron", "--xmoe", "--megatron")}  # fmt: skip


@pytest.mark.parametrize(("kind", "spoil"), [(kind, spoil) for kind, all_ in SPOILERS.items() for spoil in all_])
def test_a_spoilt_checkpoint_is_an_error_and_nothing_else(kind, spoil, sources, tmp_path, capsys):
    command, source, target = COMMANDS[kind]
    for seed in range(CASES_PER_KIND):
        rng = random.Random(f"{spoil.__name__} {seed}")
        folder, mark = tmp_path / f"spoilt{seed}", tmp_path / "mark"
        shutil.copytree(sources[kind], folder)
        name = spoil(folder, rng, mark)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        verify = ["--verify"] * rng.randrange(2)
        code = run_tool(
            "tool", convert_checkpoint.main, [command, source, str(folder), target, f"{tmp_path}/out", *verify]
        )
        errors = capsys.readouterr().err.splitlines()
        assert code == 2 and len(errors) == 1 and errors[0].startswith("tool: error: "), (seed, errors)
        assert name in errors[0] or "damaged" in errors[0], (seed, name, errors)
        assert sorted(tmp_path.iterdir()) == [folder], "something was left behind"
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        shutil.rmtree(folder)


def test_there_are_two_hundred_of_them():
    assert sum(map(len, SPOILERS.values())) * CASES_PER_KIND >= 200
