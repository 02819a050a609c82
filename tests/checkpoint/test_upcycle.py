"""Upcycling: experts cut from a dense model's layers, as Megatron does it."""

from argparse import Namespace

import pytest
import torch
from jobs import REPOSITORY, run_script
from safetensors.torch import load_file, save_file
from tiny_models import BASE, LENGTH, measured, randomize
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_xmoe.checkpoint.compare import MegatronBySlice, differences, open_both
from megatron_xmoe.checkpoint.convert import Options, hf_to_megatron
from megatron_xmoe.checkpoint.names import ConversionError
from megatron_xmoe.checkpoint.torch_dist import TorchDistReader
from megatron_xmoe.checkpoint.upcycle import Experts, upcycle


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model: (what it computes, its Megatron checkpoint)."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**BASE, num_key_value_heads=2)).eval()
    randomize(model)
    model.save_pretrained(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron", Options(verify=True))
    return measured(model, folder / "hf"), folder / "megatron"


def logits(tmp_path, megatron, tokens) -> torch.Tensor:
    """By pretrain_xmoe.py's model."""
    torch.save(tokens, tmp_path / "tokens.pt")
    script = REPOSITORY / "tests" / "checkpoint" / "logits_job.py"
    run_script(script, tmp_path / "tokens.pt", megatron, tmp_path / "out.pt")
    return torch.load(tmp_path / "out.pt")["logits"]


def test_whole_copies_compute_what_the_dense_model_does(dense, tmp_path):
    tiny, megatron = dense
    assert (logits(tmp_path, megatron, tiny.tokens) - tiny.logits).norm() < 1e-5 * tiny.logits.norm()
    upcycle(tiny.directory, tmp_path / "moe", Experts(4, topk=2), Options(verify=True))
    assert tiny.logits.shape[1] == LENGTH
    assert (logits(tmp_path, tmp_path / "moe", tiny.tokens) - tiny.logits).norm() < 1e-5 * tiny.logits.norm()


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_cuts_of_the_dense_layers(dense, tmp_path, pre_softmax):
    tiny, megatron = dense
    parts, copies, topk = 3, 2, 4
    experts = Experts(parts * copies, parts, topk, pre_softmax)
    upcycle(tiny.directory, tmp_path / "moe", experts, Options(verify=True))
    before, after = MegatronBySlice(megatron), MegatronBySlice(tmp_path / "moe")
    # arXiv:2410.07524: the outputs keep their size if three matrices share the factor that routing takes away
    scale = (copies * parts * parts / topk if pre_softmax else parts) ** (1 / 3)
    for layer in range(BASE["num_hidden_layers"]):
        prefix = f"decoder.layers.{layer}.mlp."
        gate, up = before.read(f"{prefix}linear_fc1.weight").chunk(2)
        down = before.read(f"{prefix}linear_fc2.weight")
        width = len(gate) // parts
        router = after.read(f"{prefix}router.weight")
        assert len(router.unique(dim=0)) == copies and router.std() > 0
        for expert in range(parts * copies):
            own = slice(expert % parts * width, (expert % parts + 1) * width)
            fc1 = after.read(f"{prefix}experts.experts.linear_fc1.weight[{expert}]")
            fc2 = after.read(f"{prefix}experts.experts.linear_fc2.weight[{expert}]")
            torch.testing.assert_close(fc1, torch.cat([gate[own], up[own]]) * scale)
            torch.testing.assert_close(fc2, down[:, own] * scale)
            assert torch.equal(router[expert], router[expert // parts * parts])
    rest = [line for line in differences(before, after) if ".mlp.router" not in line and "linear_fc" not in line]
    assert rest == []


def test_a_megatron_checkpoint_gives_the_same_as_its_source(dense, tmp_path):
    tiny, megatron = dense
    experts = Experts(4, 2, 2)
    upcycle(tiny.directory, tmp_path / "a", experts, Options())
    upcycle(megatron, tmp_path / "b", experts, Options(verify=True))
    ours, theirs = open_both(tmp_path / "a", tmp_path / "b")
    assert list(differences(ours, theirs)) == []
    upcycle(megatron, tmp_path / "c", Experts(4, 2, 2, seed=7), Options())
    changed = list(differences(ours, MegatronBySlice(tmp_path / "c")))
    assert len(changed) == BASE["num_hidden_layers"] and all("router.weight" in line for line in changed)


@pytest.mark.parametrize(
    ("experts", "rule"),
    [(Experts(4, 5, 2), "must divide"), (Experts(5, 2, 2), "must divide"), (Experts(4, 2, 5), "topk")],
)
def test_sizes_that_do_not_divide_are_refused(dense, tmp_path, experts, rule):
    with pytest.raises(ConversionError, match=rule):
        upcycle(dense[1], tmp_path / "moe", experts, Options())
    assert not (tmp_path / "moe").exists()


def test_a_second_embedding_is_not_dropped(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**BASE, num_key_value_heads=2, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="lm_head.weight and model.embed_tokens.weight differ"):
        upcycle(tmp_path / "hf", tmp_path / "moe", Experts(4), Options())


def test_biased_layers_are_refused(dense, tmp_path, monkeypatch):
    keys = TorchDistReader.model_keys
    bias = "decoder.layers.mlp.linear_fc1.bias"
    monkeypatch.setattr(TorchDistReader, "model_keys", lambda self: [*keys(self), bias])
    with pytest.raises(ConversionError, match=bias):
        upcycle(dense[1], tmp_path / "moe", Experts(4), Options())


@pytest.mark.parametrize(("name", "value"), [("window_size", (8, 0)), ("apply_layernorm_1p", True)])
def test_what_is_not_carried_over_is_refused(dense, tmp_path, monkeypatch, name, value):
    common = TorchDistReader.common
    changed = lambda self: {"args": Namespace(**(vars(common(self)["args"]) | {name: value}))}  # noqa: E731
    monkeypatch.setattr(TorchDistReader, "common", changed)
    with pytest.raises(ConversionError, match=name):
        upcycle(dense[1], tmp_path / "moe", Experts(4), Options())


def test_what_has_experts_already_is_refused(dense, tmp_path):
    upcycle(dense[1], tmp_path / "moe", Experts(4), Options())
    with pytest.raises(ConversionError, match="experts already"):
        upcycle(tmp_path / "moe", tmp_path / "again", Experts(4), Options())
