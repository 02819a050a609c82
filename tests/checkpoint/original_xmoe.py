"""A tiny model of the original X-MoE in plain torch, and its checkpoint as DeepSpeed would have written it."""

from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS, HIDDEN, HEADS, FFN, EXPERT_FFN, EXPERTS, TOPK, VOCABULARY, LENGTH = 3, 32, 4, 48, 24, 4, 2, 128, 12
DENSE_LAYERS = (0,)  # so that the number of a layer with experts is not the layer's
ENCODER = "language_model.encoder.layers"
EXPERT = "mlp.deepspeed_moe.experts.deepspeed_experts"


def random_model(seed: int = 0, qkv_bias: bool = True) -> dict[str, Tensor]:
    """Tensors under Megatron-DeepSpeed's names, experts included; biases that the original would drop are zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)

    model = {"language_model.embedding.word_embeddings.weight": draw(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"{ENCODER}.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            model[f"{prefix}{norm}.weight"], model[f"{prefix}{norm}.bias"] = draw(HIDDEN), draw(HIDDEN)
        model[f"{prefix}self_attention.query_key_value.weight"] = draw(3 * HIDDEN, HIDDEN)
        model[f"{prefix}self_attention.query_key_value.bias"] = draw(3 * HIDDEN) * qkv_bias
        model[f"{prefix}self_attention.dense.weight"] = draw(HIDDEN, HIDDEN)
        model[f"{prefix}self_attention.dense.bias"] = torch.zeros(HIDDEN)
        if layer in DENSE_LAYERS:
            model[f"{prefix}mlp.dense_h_to_4h.weight"] = draw(FFN, HIDDEN)
            model[f"{prefix}mlp.dense_4h_to_h.weight"] = draw(HIDDEN, FFN)
            continue
        model[f"{prefix}mlp.deepspeed_moe.gate.wg.weight"] = draw(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            model[f"{prefix}{EXPERT}.{expert}.dense_h_to_4h.weight"] = draw(EXPERT_FFN, HIDDEN)
            model[f"{prefix}{EXPERT}.{expert}.dense_4h_to_h.weight"] = draw(HIDDEN, EXPERT_FFN)
            model[f"{prefix}{EXPERT}.{expert}.dense_4h_to_h.bias"] = draw(HIDDEN)  # the original never adds it
    final = "language_model.encoder.final_layernorm"
    return model | {f"{final}.weight": draw(HIDDEN), f"{final}.bias": draw(HIDDEN)}


def logits(model: dict[str, Tensor], tokens: Tensor, raw: bool) -> Tensor:
    """Logits [B, S, V] of tokens [B, S]; `raw`, experts weighted by logits as by X-MoE's code, else DeepSpeed's."""
    embedding = model["language_model.embedding.word_embeddings.weight"]
    hidden = embedding[tokens]
    for layer in range(LAYERS):
        own = {
            name.removeprefix(f"{ENCODER}.{layer}."): t for name, t in model.items() if f"{ENCODER}.{layer}." in name
        }
        hidden = hidden + _attention(_norm(hidden, own, "input_layernorm"), own)
        rows = _norm(hidden, own, "post_attention_layernorm")
        hidden = hidden + (_mlp(rows, own, "mlp") if layer in DENSE_LAYERS else _experts(rows, own, raw))
    own = {name.removeprefix("language_model.encoder."): tensor for name, tensor in model.items()}
    return _norm(hidden, own, "final_layernorm") @ embedding.T


def _norm(hidden: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(hidden, (HIDDEN,), own[f"{name}.weight"], own[f"{name}.bias"], eps=1e-5)


def _attention(hidden: Tensor, own: dict[str, Tensor]) -> Tensor:
    size, length = HIDDEN // HEADS, hidden.shape[1]
    qkv = F.linear(hidden, own["self_attention.query_key_value.weight"], own["self_attention.query_key_value.bias"])
    query, key, value = qkv.view(*hidden.shape[:2], HEADS, 3, size).permute(3, 0, 2, 1, 4)
    angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    scores = rotate(query) @ rotate(key).transpose(-1, -2) / size**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return mixed @ own["self_attention.dense.weight"].T


def _mlp(rows: Tensor, own: dict[str, Tensor], prefix: str) -> Tensor:
    return F.gelu(rows @ own[f"{prefix}.dense_h_to_4h.weight"].T) @ own[f"{prefix}.dense_4h_to_h.weight"].T


def _experts(rows: Tensor, own: dict[str, Tensor], raw: bool) -> Tensor:
    gate = rows @ own["mlp.deepspeed_moe.gate.wg.weight"].T
    chosen = gate.topk(TOPK, dim=-1).indices
    weights = (gate if raw else gate.softmax(-1)).gather(-1, chosen)
    if not raw and TOPK > 1:  # DeepSpeed's gate of two divides by the sum of the chosen, that of one does not
        weights = weights / weights.sum(-1, keepdim=True)
    every = torch.stack([_mlp(rows, own, f"{EXPERT}.{expert}") for expert in range(EXPERTS)], dim=-2)
    return (every.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, HIDDEN)) * weights.unsqueeze(-1)).sum(-2)


def save(
    model: dict[str, Tensor], directory: Path, ranks: int = 1, shard_experts: bool = False, pft: bool = True
) -> None:
    """The files of a checkpoint with `ranks` tensor-parallel ranks, their experts whole or shared out.

    Args: pft, whether it was X-MoE's own layer.
    """
    folder = directory / "global_step7"
    folder.mkdir(parents=True)
    (directory / "latest").write_text("global_step7")
    moe_layers = [layer for layer in range(LAYERS) if layer not in DENSE_LAYERS]
    for rank in range(ranks):
        shared = {name: _share(name, t, rank, ranks) for name, t in model.items() if EXPERT not in name}
        torch.save(_state(shared, pft), folder / f"mp_rank_{rank:02d}_model_states.pt")
        for moe_layer, layer in enumerate(moe_layers):
            for expert in range(EXPERTS):
                prefix = f"{ENCODER}.{layer}.{EXPERT}.{expert}."
                own = {name: tensor for name, tensor in model.items() if name.startswith(prefix)}
                if shard_experts:
                    own = {name: _share(name, tensor, rank, ranks) for name, tensor in own.items()}
                file = f"layer_{moe_layer}_expert_{expert}_mp_rank_{rank:02d}_model_states.pt"
                torch.save({name: tensor.clone() for name, tensor in own.items()}, folder / file)


def _state(shared: dict[str, Tensor], pft: bool) -> dict:
    args = Namespace(num_attention_heads=HEADS, topk=TOPK, max_position_embeddings=64, seq_length=16,
                     layernorm_epsilon=1e-5, use_uneven_all_to_all=pft, use_pft=pft)  # fmt: skip
    return {"module": shared, "args": args, "iteration": 7, "lr_scheduler": None, "num_experts": [EXPERTS, EXPERTS]}


def _share(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's share as Megatron's column- and row-parallel layers have it."""
    rows = ("word_embeddings.weight", "query_key_value.weight", "query_key_value.bias", "dense_h_to_4h.weight")
    columns = ("dense.weight", "dense_4h_to_h.weight")
    if name.endswith(rows) or name.endswith(columns):
        return tensor.chunk(ranks, dim=0 if name.endswith(rows) else 1)[rank].clone()
    return tensor.clone()
