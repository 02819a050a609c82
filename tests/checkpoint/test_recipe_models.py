"""The recipes are the models that they are named after: every parameter, and options that leave no trace in shapes."""

import math
import re
import sys
from dataclasses import dataclass

import pytest
import torch
from jobs import REPOSITORY
from published_models import PUBLISHED
from recipes import NAMES, dry_run, words_of
from tiny_models import deepseek_v1
from transformers import AutoModelForCausalLM

from megatron_xmoe.checkpoint.families import load_config
from megatron_xmoe.checkpoint.families.base import spell_out

PAGE = REPOSITORY / "docs" / "recipes.md"
MODELS = {
    "deepseek_moe_16b": "DeepSeek-MoE-16B",
    "deepseek_v2_lite": "DeepSeek-V2-Lite",
    "deepseek_v3": "DeepSeek-V3",
    "mixtral_8x7b": "Mixtral-8x7B",
    "olmoe_1b_7b": "OLMoE-1B-7B",
    "qwen3_30b_a3b": "Qwen3-30B-A3B",
}
# what a recipe decides for itself: the vocabulary is the tokenizer's, and weights are drawn as the reports say
OF_THE_RECIPE = {"padded_vocab_size", "seq_length", "init_method_std"}


@dataclass
class Paper:
    """A line of the X-MoE paper's table of models."""

    layers: int
    hidden: int
    ffn: int
    experts: int
    topk: int
    sequence: int
    total: float
    """Parameters of experts and attention in 2^30, as printed."""


PAPER = {
    "xmoe_small": Paper(28, 2048, 1408, 64, 6, 2048, 10.1),
    "xmoe_medium": Paper(28, 5120, 1536, 128, 6, 4096, 55.2),
    "xmoe_large": Paper(28, 7168, 2048, 256, 8, 4096, 201.4),
    "xmoe_super": Paper(61, 7168, 2560, 256, 8, 4096, 545.4),
}
HEADS = {"xmoe_small": 16, "xmoe_medium": 128, "xmoe_large": 128, "xmoe_super": 128}
# (processes, TP, EP, micro-batch, global batch)
LAYOUTS = {
    "xmoe_small": (256, 1, 8, 4, 8192),
    "xmoe_medium": (256, 1, 64, 1, 1024),
    "xmoe_large": (256, 2, 64, 1, 1024),
    "xmoe_super": (1024, 4, 256, 1, 1024),
}
IN_BILLIONS = {"xmoe_small": "10.80", "xmoe_medium": "59.3", "xmoe_large": "216.2", "xmoe_super": "585.6"}


def options_of(name, monkeypatch, **environment):
    """The parsed options of a recipe."""
    from megatron_xmoe.training.arguments import parse

    monkeypatch.setattr(sys, "argv", ["pretrain_xmoe.py", *words_of(name, **environment)])
    return parse()[0]


def hf_parameters(name: str) -> int:
    """Number of parameters of the model that transformers builds of a published configuration."""
    with torch.device("meta"):
        if PUBLISHED[name]["model_type"] == "deepseek":
            model = deepseek_v1(PUBLISHED[name])
        else:
            model = AutoModelForCausalLM.from_config(load_config(PUBLISHED[name], name)[1])
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters())


def is_documented(recipe: str, count: int) -> bool:
    """Whether docs/recipes.md has this number of parameters, rounded to four digits."""
    row = re.search(rf"^\| `{recipe}.sh` \| [^|]* \| ([^|]*) \|", PAGE.read_text(), re.MULTILINE)
    return row is not None and row[1] == f"{count / 1e9:#.4g}e9"


def test_every_recipe_is_compared():
    assert sorted([*MODELS, *PAPER]) == NAMES


@pytest.mark.parametrize("recipe", MODELS)
def test_as_many_parameters_as_in_transformers(recipe):
    count = dry_run(recipe).figure("parameters")
    assert count == hf_parameters(MODELS[recipe]) and is_documented(recipe, count)


@pytest.mark.parametrize("recipe", MODELS)
def test_options_are_those_of_the_converted_model(recipe, monkeypatch):
    """What the conversion of the published checkpoint writes into megatron_args.txt, the recipe says too."""
    expected = spell_out(*load_config(PUBLISHED[MODELS[recipe]], recipe), "local").arguments
    args = options_of(recipe, monkeypatch)
    parsed = {name: getattr(args, name) for name in expected if name not in OF_THE_RECIPE}
    assert parsed == {name: value for name, value in expected.items() if name not in OF_THE_RECIPE}
    assert args.vocab_size == PUBLISHED[MODELS[recipe]]["vocab_size"]


@pytest.mark.parametrize("recipe", PAPER)
def test_xmoe_has_the_papers_parameters(recipe):
    paper, (processes, tp, ep, _, _) = PAPER[recipe], LAYOUTS[recipe]
    result = dry_run(recipe)
    count = result.figure("experts + attention")
    assert round(count / 2**30, 1) == paper.total
    assert f"{count / 1e9:.{len(IN_BILLIONS[recipe].split('.')[1])}f}" == IN_BILLIONS[recipe]
    padded = -(-50257 // (128 * tp)) * 128 * tp
    assert result.figure("vocabulary padding") == (padded - 50257) * paper.hidden
    assert result.figure("parameters") == sum(whole for part, (_, whole) in result.parts.items()
                                              if part != "together") - (padded - 50257) * paper.hidden  # fmt: skip
    assert is_documented(recipe, result.figure("parameters"))
    if recipe == "xmoe_super":  # shown there as an example
        assert {*result.lines[:5], *result.lines[-3:]} <= set(PAGE.read_text().splitlines())
    # the rank is one of the layout's
    assert result.lines[0].startswith(f"rank 0 of {processes}: tensor {tp}, ")
    for part, shards in (("experts", ep), ("attention", tp), ("embedding", tp)):
        mine, whole = result.parts[part]
        assert mine * shards == whole, part


@pytest.mark.parametrize("recipe", PAPER)
def test_xmoe_trains_as_the_paper_does(recipe, monkeypatch):
    paper, (_, tp, ep, micro_batch, global_batch) = PAPER[recipe], LAYOUTS[recipe]
    args = options_of(recipe, monkeypatch)
    expected = {
        "num_layers": paper.layers, "hidden_size": paper.hidden, "moe_ffn_hidden_size": paper.ffn,
        "num_experts": paper.experts, "moe_router_topk": paper.topk, "seq_length": paper.sequence,
        "num_attention_heads": HEADS[recipe], "tensor_model_parallel_size": tp, "expert_model_parallel_size": ep,
        "micro_batch_size": micro_batch, "global_batch_size": global_batch, "use_distributed_optimizer": True,
        "vocab_size": 50257, "make_vocab_size_divisible_by": 128, "position_embedding_type": "rope",
        "normalization": "LayerNorm", "swiglu": False, "fp16": True, "optimizer": "adam", "adam_beta1": 0.9,
        "adam_beta2": 0.95, "lr": 1.2e-4, "min_lr": 1e-6, "lr_decay_style": "cosine", "weight_decay": 0.1,
        "clip_grad": 1.0, "init_method_std": 0.014, "moe_aux_loss_coeff": [0.01], "moe_layer_freq": 1,
        "moe_router_load_balancing_type": ["aux_loss"], "moe_router_pre_softmax": True,
        "moe_expert_capacity_factor": 1.25, "xmoe_min_capacity": 4, "sequence_parallel": False,
        "xmoe_sequence_shard": "auto",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_swiglu_has_half_as_many_parameters_again_in_the_experts():
    plain, gated = dry_run("xmoe_small"), dry_run("xmoe_small", SWIGLU="1")
    assert gated.parts["experts"][1] * 2 == plain.parts["experts"][1] * 3
    assert {part: n for part, n in gated.parts.items() if part not in ("experts", "together")} == {
        part: n for part, n in plain.parts.items() if part not in ("experts", "together")
    }


def test_further_tokens_come_on_top():
    """One layer that predicts a token further; the published number of parameters is without it."""
    family, config = load_config(PUBLISHED["DeepSeek-V3"], "DeepSeek-V3")
    rules = [spell_out(family, config, "local", predictions).rules for predictions in (0, 1)]
    added = [rule for rule in rules[1][len(rules[0]) :] if "expert_bias" not in str(rule)]  # a buffer
    cut = ("--num-layers", "4", "--moe-layer-freq", "([0]*3+[1])")
    layout = {"GPUS": "16", "PP": "1", "EP": "16"}
    plain, further = (dry_run("deepseek_v3", *cut, **layout, MTP=n).figure("parameters") for n in "01")
    assert further - plain == sum(math.prod(shape) for rule in added for shape in rule.shapes)
