"""Checkpoints of the original X-MoE: the same outputs as the original's arithmetic, and no pickle that runs code."""

import os

import original_xmoe
import pytest
import torch
from jobs import REPOSITORY, run_script

from megatron_xmoe.checkpoint.compare import differences, open_both
from megatron_xmoe.checkpoint.convert import ARGUMENTS, Options
from megatron_xmoe.checkpoint.names import ConversionError
from megatron_xmoe.checkpoint.xmoe_convert import xmoe_to_megatron


@pytest.fixture
def original(tmp_path):
    """A checkpoint of one rank: (tensors, folder)."""
    model = original_xmoe.random_model()
    original_xmoe.save(model, tmp_path / "xmoe")
    return model, tmp_path / "xmoe"


def compute(tmp_path, megatron, tokens, *arguments: str) -> torch.Tensor:
    """Logits by pretrain_xmoe.py's model."""
    torch.save(tokens, tmp_path / "tokens.pt")
    script = REPOSITORY / "tests" / "checkpoint" / "logits_job.py"
    run_script(script, tmp_path / "tokens.pt", megatron, tmp_path / "out.pt", *arguments)
    return torch.load(tmp_path / "out.pt")["logits"]


@pytest.mark.parametrize(("pft", "topk"), [(True, 2), (False, 2), (False, 1)])
def test_outputs_are_the_originals(tmp_path, monkeypatch, pft, topk):
    """X-MoE's own layer weighs by logits; DeepSpeed's by probabilities, normalised where there are two."""
    monkeypatch.setattr(original_xmoe, "TOPK", topk)
    model, folder = original_xmoe.random_model(), tmp_path / "xmoe"
    original_xmoe.save(model, folder, pft=pft)
    xmoe_to_megatron(folder, tmp_path / "megatron", Options(verify=True))
    assert ("--xmoe-combine-weights logits" in (tmp_path / "megatron" / ARGUMENTS).read_text()) == pft
    tokens = torch.randint(0, original_xmoe.VOCABULARY, (2, original_xmoe.LENGTH + 1))
    got = compute(tmp_path, tmp_path / "megatron", tokens)
    wanted = original_xmoe.logits(model, tokens[:, :-1], raw=pft)
    other = original_xmoe.logits(model, tokens[:, :-1], raw=not pft)
    assert (got - wanted).norm() < 1e-5 * wanted.norm()
    assert (got - other).norm() > 1e-2 * wanted.norm()


@pytest.mark.parametrize("shard_experts", [False, True])
def test_tensor_parallel_ranks_are_joined(original, tmp_path, shard_experts):
    model, folder = original
    original_xmoe.save(model, tmp_path / "two", ranks=2, shard_experts=shard_experts)
    xmoe_to_megatron(folder, tmp_path / "from_one", Options())
    xmoe_to_megatron(tmp_path / "two", tmp_path / "from_two", Options(verify=True))
    assert list(differences(*open_both(tmp_path / "from_one", tmp_path / "from_two"))) == []


def test_layers_are_stacked_as_megatron_does_without_dense_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(original_xmoe, "DENSE_LAYERS", ())
    model = original_xmoe.random_model(qkv_bias=False)
    original_xmoe.save(model, tmp_path / "xmoe")
    xmoe_to_megatron(tmp_path / "xmoe", tmp_path / "megatron", Options())
    text = (tmp_path / "megatron" / ARGUMENTS).read_text()
    assert "--moe-layer-freq" not in text and "--add-qkv-bias" not in text
    tokens = torch.randint(0, original_xmoe.VOCABULARY, (1, original_xmoe.LENGTH + 1))
    wanted = original_xmoe.logits(model, tokens[:, :-1], raw=True)
    assert (compute(tmp_path, tmp_path / "megatron", tokens) - wanted).norm() < 1e-5 * wanted.norm()


def test_a_bias_that_the_model_lacks_is_refused_by_name(original, tmp_path):
    model, _ = original
    name = f"{original_xmoe.ENCODER}.1.self_attention.dense.bias"
    model[name] = torch.randn(original_xmoe.HIDDEN)
    original_xmoe.save(model, tmp_path / "biased")
    with pytest.raises(ConversionError, match=f"{name} is a bias that is not zero"):
        xmoe_to_megatron(tmp_path / "biased", tmp_path / "megatron", Options())
    assert not (tmp_path / "megatron").exists()


def rewritten(folder, **changes):
    """Changes the checkpoint's arguments, or its version."""
    path = folder / "global_step7" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    if "checkpoint_version" in changes:
        state["checkpoint_version"] = changes.pop("checkpoint_version")
    vars(state["args"]).update(changes)
    torch.save(state, path)


def test_what_its_arguments_say_goes_along(original, tmp_path):
    _, folder = original
    rewritten(folder, rope_theta=50000.0, rotary_percent=0.5, squared_relu=True, checkpoint_version=3.0)
    xmoe_to_megatron(folder, tmp_path / "megatron", Options())
    text = (tmp_path / "megatron" / ARGUMENTS).read_text()
    assert all(f"--{words}" in text for words in ("rotary-base 50000 ", "rotary-percent 0.5", "squared-relu"))


@pytest.mark.parametrize(("base", "same"), [(10000.0, True), (50000.0, False)])
def test_frequencies_have_to_follow_from_the_base(original, tmp_path, base, same):
    model, _ = original
    size = original_xmoe.HIDDEN // original_xmoe.HEADS
    name = "language_model.rotary_pos_emb.inv_freq"
    original_xmoe.save(model | {name: base ** (-torch.arange(0, size, 2) / size)}, tmp_path / "with")
    if same:
        xmoe_to_megatron(tmp_path / "with", tmp_path / "megatron", Options())
        return
    with pytest.raises(ConversionError, match=f"{name} does not follow"):
        xmoe_to_megatron(tmp_path / "with", tmp_path / "megatron", Options())


@pytest.mark.parametrize("changes", [{"apply_layernorm_1p": True}, {"checkpoint_version": 1.0}])
def test_what_megatron_orders_or_computes_otherwise_is_refused(original, tmp_path, changes):
    _, folder = original
    rewritten(folder, **changes)
    with pytest.raises(ConversionError, match=next(iter(changes))):
        xmoe_to_megatron(folder, tmp_path / "megatron", Options())


@pytest.mark.parametrize("rotary", ["argument", "frequencies", None])
def test_two_kinds_of_positions_are_refused(original, tmp_path, rotary):
    """As the published scripts train: --use-rotary-position-embeddings without --no-position-embedding."""
    model, _ = original
    size = original_xmoe.HIDDEN // original_xmoe.HEADS
    added = {"language_model.embedding.position_embeddings.weight": torch.randn(64, original_xmoe.HIDDEN)}
    if rotary == "frequencies":
        added["language_model.rotary_pos_emb.inv_freq"] = 10000.0 ** (-torch.arange(0, size, 2) / size)
    original_xmoe.save(model | added, tmp_path / "both")
    if rotary == "argument":
        rewritten(tmp_path / "both", use_rotary_position_embeddings=True)
    if rotary is None:
        xmoe_to_megatron(tmp_path / "both", tmp_path / "megatron", Options())
        assert "--position-embedding-type learned_absolute" in (tmp_path / "megatron" / ARGUMENTS).read_text()
        return
    with pytest.raises(ConversionError, match="learned positions and was trained with use_rotary_position_embeddings"):
        xmoe_to_megatron(tmp_path / "both", tmp_path / "megatron", Options())
    assert not (tmp_path / "megatron").exists()


class Touch:
    """Pickles to a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.open, (str(self.path), os.O_CREAT)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "layer_1_expert_2_mp_rank_00_model_states.pt"])
def test_a_pickle_runs_only_if_it_is_trusted(original, tmp_path, file):
    _, folder = original
    path, mark = folder / "global_step7" / file, tmp_path / "mark"
    state = torch.load(path, weights_only=False)
    key = "client" if "module" in state else None
    torch.save({**state, **({key: Touch(mark)} if key else {"x": Touch(mark)})}, path)
    with pytest.raises(ConversionError, match="--trust-pickle"):
        xmoe_to_megatron(folder, tmp_path / "megatron", Options())
    assert not mark.exists() and not (tmp_path / "megatron").exists()
    if key:
        xmoe_to_megatron(folder, tmp_path / "megatron", Options(), trust_pickle=True)
        assert mark.exists() and (tmp_path / "megatron").exists()
