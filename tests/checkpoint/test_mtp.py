"""DeepSeek-V3's multi-token-prediction layer, which transformers leaves out: its names, its copies, its outputs."""

import json

import pytest
import torch
from jobs import REPOSITORY, run_script
from safetensors.torch import save_file
from tiny_models import CASES, LENGTH, measured, per_expert, randomize
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from megatron_xmoe.checkpoint.convert import ARGUMENTS, Options, hf_to_megatron, megatron_to_hf
from megatron_xmoe.checkpoint.hf import HFReader
from megatron_xmoe.checkpoint.names import ConversionError


class Prediction(torch.nn.Module):
    """The layer that follows the last one, under its names on disk."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.block = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.enorm, self.hnorm = (DeepseekV3RMSNorm(width, config.rms_norm_eps) for _ in range(2))
        self.eh_proj = torch.nn.Linear(2 * width, width, bias=False)
        self.shared_head = torch.nn.ModuleDict({"norm": DeepseekV3RMSNorm(width, config.rms_norm_eps)})

    @torch.no_grad()
    def forward(self, model, tokens):
        """Logits for the token after the next, [B, S - 1, V], from tokens [B, S]."""
        hidden = model.model(tokens).last_hidden_state[:, :-1]
        following = model.model.embed_tokens(tokens[:, 1:])
        joined = self.eh_proj(torch.cat([self.enorm(following), self.hnorm(hidden)], dim=-1))
        length = joined.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        positions = torch.arange(length).unsqueeze(0)
        rotary = model.model.rotary_emb(joined, positions)
        out = self.block(joined, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        return model.lm_head(self.shared_head["norm"](out[0] if isinstance(out, tuple) else out))


@pytest.fixture(scope="module")
def predicting(tmp_path_factory):
    """A checkpoint with such a layer: (folder, model, layer, tokens)."""
    folder = tmp_path_factory.mktemp("mtp") / "hf"
    torch.manual_seed(3)
    config = DeepseekV3Config(**CASES["deepseek_v3"][1])
    model, layer = DeepseekV3ForCausalLM(config).eval(), Prediction(config).eval()
    randomize(model)
    randomize(layer)
    model.save_pretrained(folder)
    prefix = f"model.layers.{config.num_hidden_layers}."
    tensors = {name.removeprefix("block."): tensor for name, tensor in per_expert(layer.state_dict()).items()}
    tensors |= {"embed_tokens.weight": model.model.embed_tokens.weight, "shared_head.head.weight": model.lm_head.weight}
    state = per_expert(model.state_dict()) | {
        prefix + name: tensor.detach().clone() for name, tensor in tensors.items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(values))
    return folder, model, layer, measured(model, folder).tokens


def test_there_and_back_again_with_the_copies(predicting, tmp_path):
    folder, *_ = predicting
    hf_to_megatron(folder, tmp_path / "megatron", Options(verify=True))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", Options(verify=True))
    before, after = HFReader(folder), HFReader(tmp_path / "back")
    assert set(before.names()) == set(after.names())
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    assert "--mtp-num-layers 1" in (tmp_path / "megatron" / ARGUMENTS).read_text()


def test_tied_embeddings_have_copies_of_copies(predicting, tmp_path):
    folder, *_ = predicting
    (tmp_path / "hf").mkdir()
    tensors = {name: HFReader(folder).read(name) for name in HFReader(folder).names()}
    del tensors["lm_head.weight"]
    tensors["model.layers.3.shared_head.head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    values = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values))
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", Options(verify=True))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", Options(verify=True))
    after = HFReader(tmp_path / "back")
    assert set(tensors) == set(after.names())
    assert all(torch.equal(tensor, after.read(name)) for name, tensor in tensors.items())


def test_a_copy_that_is_none_is_refused(predicting, tmp_path):
    folder, *_ = predicting
    tensors = {name: HFReader(folder).read(name) for name in HFReader(folder).names()}
    tensors["model.layers.3.embed_tokens.weight"][0, 0] += 1
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(
        ConversionError, match="model.layers.3.embed_tokens.weight and model.embed_tokens.weight differ"
    ):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", Options())
    assert not (tmp_path / "megatron").exists()


def test_the_predictions_are_those_of_the_published_model(predicting, tmp_path):
    folder, model, layer, tokens = predicting
    hf_to_megatron(folder, tmp_path / "megatron", Options())
    torch.save(tokens, tmp_path / "tokens.pt")
    script = REPOSITORY / "tests" / "checkpoint" / "mtp_job.py"
    run_script(script, tmp_path / "tokens.pt", tmp_path / "megatron", tmp_path / "out.pt")
    inputs = tokens[:1, :-1]
    wanted = layer(model, inputs)
    got = torch.load(tmp_path / "out.pt")[:, : LENGTH - 1]
    assert got.shape == wanted.shape and (got - wanted).norm() < 1e-5 * wanted.norm()
