"""The original X-MoE's checkpoints -> Megatron."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_xmoe.checkpoint.convert import SLACK_BYTES, Options, implementation, precision, write_arguments
from megatron_xmoe.checkpoint.deepspeed_xmoe import (
    DERIVED,
    EXPERT,
    LAYER,
    LAYER_KEY,
    MODEL,
    UNUSED_BIASES,
    ZERO_BIASES,
    Part,
    XMoEReader,
    merge,
    spell_layer,
)
from megatron_xmoe.checkpoint.names import ConversionError, Slot, command_line, extra_states, few
from megatron_xmoe.checkpoint.report import Report, check_new, new_folder
from megatron_xmoe.checkpoint.saved import check_frequencies
from megatron_xmoe.checkpoint.torch_dist import Piece, TorchDistReader, write_checkpoint
from megatron_xmoe.checkpoint.views import bits, cast


@dataclass
class _Plan:
    """What becomes of every tensor."""

    parts: list[Part] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, why: str) -> None:
        self.dropped[why] = self.dropped.get(why, 0) + 1


def xmoe_to_megatron(
    xmoe: Path,
    megatron: Path,
    options: Options,
    trust_pickle: bool = False,
    heads: int | None = None,
    topk: int | None = None,
) -> Report:
    """Convert an original checkpoint into one that `pretrain_xmoe.py --load` reads.

    Args: heads and topk, what the checkpoint's own arguments say, where they cannot be read.

    Raises:
        ConversionError: tensors are missing, not known or not served; the output exists or cannot be written.
    """
    if not options.dry_run:
        check_new(megatron)
    reader = XMoEReader(xmoe, trust_pickle)
    plan = _plan(reader, options.implementation)
    report = Report("X-MoE: original -> Megatron", options.dry_run)
    report.notes += [f"{count} left out: {why}" for why, count in sorted(plan.dropped.items())]
    pieces = [_piece(part, options, report) for part in plan.parts]
    arguments = _arguments(reader, plan, heads, topk) | precision(pieces) | implementation(options)
    if options.dry_run:
        for part, piece in zip(plan.parts, pieces, strict=True):
            report.count_read(slot_bytes(part.slot, part.dtype), part.sources)
            report.count_written(piece.nbytes, "copy" if part.sources == 1 else "ranks joined")
        return report
    size = sum(piece.nbytes for piece in pieces)
    total = sum(slot_bytes(part.slot, part.dtype) for part in plan.parts)
    with new_folder(megatron, size + SLACK_BYTES) as folder, report.progress(total):
        write_checkpoint(folder, pieces, extra_states(part.slot for part in plan.parts), arguments)
        write_arguments(folder, command_line(arguments))
        if options.verify:
            _verify(folder, plan.parts, options, report)
    return report


def _piece(part: Part, options: Options, report: Report) -> Piece:
    slot, dtype = part.slot, options.dtype_of(part.slot.key, part.dtype)

    def make() -> Tensor:
        tensor = part.read()
        report.count_read(tensor.nbytes, part.sources)
        report.count_written(slot_bytes(slot, dtype), "copy" if part.sources == 1 else "ranks joined")
        return cast(tensor, dtype, str(slot))

    return Piece(slot.key, slot.offsets, slot.sizes, slot.global_shape, dtype, make)


def slot_bytes(slot: Slot, dtype: torch.dtype) -> int:
    """Size of a slice's values."""
    return torch.Size(slot.shape).numel() * dtype.itemsize


def _verify(folder: Path, parts: list[Part], options: Options, report: Report) -> None:
    target = TorchDistReader(folder)
    for part in parts:
        stored = target.read(part.slot.key, part.slot.offsets, part.slot.sizes).reshape(part.slot.shape)
        wanted = cast(part.read(), options.dtype_of(part.slot.key, part.dtype), str(part.slot))
        if not torch.equal(bits(stored), bits(wanted)):
            raise ConversionError(f"verification: {part.slot} does not hold the values of the source")
    report.notes.append(f"verified: {len(parts)} slices were read again and hold the source's bits")


def _plan(reader: XMoEReader, implementation: str) -> _Plan:
    """Every tensor gets a place, or a reason to have none.

    Raises:
        ConversionError: one has neither.
    """
    plan, shared = _Plan(), reader.shared[0]
    layers = 1 + max((int(m[1]) for m in map(LAYER_KEY.match, shared) if m), default=-1)
    if not layers:
        raise ConversionError(f"{reader.directory} holds no language_model.encoder.layers")
    mixed = reader.expert_layers not in ([], list(range(layers)))
    biases = [name for name in shared if name.endswith("query_key_value.bias")]
    keep_bias = any(bool(rank[name].any()) for rank in reader.shared for name in biases)
    for name, (key, dim) in MODEL.items():
        if name in shared:
            _add(plan, reader, name, Slot(key, (), (), ()), dim)
    for layer in range(layers):
        prefix = f"decoder.layers.{layer}." if mixed else "decoder.layers."
        index, axes = ((), ()) if mixed else ((layer,), (layers,))
        for name, (key, dim) in spell_layer(reader, layer, implementation).items():
            if name in shared and (keep_bias or not name.endswith("query_key_value.bias")):
                _add(plan, reader, name, Slot(prefix + key, index, axes, ()), dim)
    for moe_layer, layer in enumerate(reader.expert_layers):
        prefix = f"decoder.layers.{layer}." if mixed else "decoder.layers."
        index, axes = ((), ()) if mixed else ((layer,), (layers,))
        for expert in range(reader.num_experts):
            place = (*index, expert), (*axes, reader.num_experts)
            _add_expert(plan, reader, (moe_layer, expert), prefix, *place)
    _account(plan, reader, layers)
    return plan


def _add(plan: _Plan, reader: XMoEReader, name: str, slot: Slot, dim: int | None) -> None:
    parts = [shared[name] for shared in reader.shared]
    second = reader.shared[0].get(name.replace("dense_h_to_4h", "dense_4h_to_h"))
    gated = name.endswith("mlp.dense_h_to_4h.weight") and _is_gated(parts[0], second)
    read = partial(merge, parts, dim, name, gated)
    shape = list(parts[0].shape)
    if dim is not None:
        shape[dim] *= len(parts)
    if dim is None:
        read()  # the ranks' copies are equal, or this raises before anything is written
    plan.used.add(name)
    sources = len(parts)
    plan.parts.append(Part(Slot(slot.key, slot.index, slot.axes, tuple(shape)), parts[0].dtype, read, sources))


def _is_gated(fc1: Tensor, fc2: Tensor | None) -> bool:
    return fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]


def _add_expert(plan: _Plan, reader: XMoEReader, which: tuple[int, int], prefix: str, index, axes) -> None:
    ranks = reader.expert(*which)
    names = set(ranks[0])
    where = f"{reader.directory}: layer_{which[0]}_expert_{which[1]}"
    if missing := sorted(EXPERT.keys() - names):
        raise ConversionError(f"{where} lacks {few(missing)}")
    for name in sorted(names):
        if name in UNUSED_BIASES:
            plan.drop("second biases of experts, which the original never adds")
        elif name in ZERO_BIASES:
            _check_zero(f"{where}: {name}", [rank[name] for rank in ranks])
            plan.drop("biases that are zero")
        elif name not in EXPERT:
            raise ConversionError(f"{where} holds {name}, which no line of the table matches")
    fc1, fc2 = (ranks[0][name] for name in EXPERT)
    gated = _is_gated(fc1, fc2)
    # sequence-sharded training keeps experts whole on every rank: their two matrices fit the hidden size either way,
    # but shares of ranks are not equal
    whole = len(ranks) > 1 and all(torch.equal(ranks[0][name], rank[name]) for rank in ranks[1:] for name in EXPERT)
    hidden = reader.shared[0]["language_model.embedding.word_embeddings.weight"].shape[1]
    for name, (key, dim) in EXPERT.items():
        shape = list(ranks[0][name].shape)
        if len(shape) != 2 or shape[1 - dim] != hidden:
            raise ConversionError(f"{where}: {name} has the shape {tuple(shape)}; the hidden size is {hidden}")
        joined = len(ranks) > 1 and not whole
        shape[dim] *= len(ranks) if joined else 1
        read = partial(_read_expert, reader, which, name, dim if joined else None, gated)
        slot = Slot(prefix + key, index, axes, tuple(shape))
        plan.parts.append(Part(slot, ranks[0][name].dtype, read, len(ranks) if joined else 1))


def _read_expert(reader: XMoEReader, which: tuple[int, int], name: str, dim: int | None, gated: bool) -> Tensor:
    return merge([rank[name] for rank in reader.expert(*which)], dim, name, gated and name.startswith("dense_h"))


def _check_zero(name: str, tensors: list[Tensor]) -> None:
    if any(bool(tensor.any()) for tensor in tensors):
        raise ConversionError(
            f"{name} is a bias that is not zero; this conversion makes models without such biases, so outputs would be "
            "others. Fix: none; train without it (--disable-bias-linear)"
        )


def _account(plan: _Plan, reader: XMoEReader, layers: int) -> None:
    """Raises ConversionError for a tensor without a place, for places without one, and for shapes that differ."""
    for name in reader.shared[0]:
        match = LAYER_KEY.match(name)
        if name in plan.used:
            continue
        if DERIVED.search(name):
            plan.drop("frequencies of the rotary positions, which follow from the base")
        elif match and match[2] in (*ZERO_BIASES, "self_attention.query_key_value.bias"):
            _check_zero(name, [shared[name] for shared in reader.shared])
            plan.drop("biases that are zero")
        else:
            raise ConversionError(f"{reader.directory} holds {name}, which no line of the table matches")
    norm_bias = "language_model.encoder.final_layernorm.bias" in reader.shared[0]
    for layer in range(layers):
        experts = layer in reader.expert_layers
        needed = [name for name in LAYER if "bias" not in name and ("mlp." not in name or ("gate" in name) == experts)]
        needed += [name for name in LAYER if norm_bias and name.endswith("layernorm.bias")]
        full = [f"language_model.encoder.layers.{layer}.{name}" for name in needed]
        if missing := [name for name in full if name not in plan.used]:
            raise ConversionError(f"{reader.directory} lacks {few(missing)}")
    always = [name for name in list(MODEL)[:3] if "position" not in name]
    if missing := [name for name in always if name not in plan.used]:
        raise ConversionError(f"{reader.directory} lacks {few(missing)}")
    shapes: dict[str, tuple] = {}
    for part in plan.parts:
        first = shapes.setdefault(part.slot.key, (part.slot.shape, part.dtype))
        if first != (part.slot.shape, part.dtype):
            raise ConversionError(
                f"{reader.directory}: {part.slot} is {part.slot.shape} {part.dtype}; others there are {first}"
            )


def _arguments(reader: XMoEReader, plan: _Plan, heads: int | None, topk: int | None) -> dict[str, object]:
    """Megatron's arguments, from shapes and from what the checkpoint was trained with.

    Raises:
        ConversionError: the number of heads or of experts per token is not known.
    """
    saved = vars(reader.args)
    _check_saved(reader, saved)
    heads = heads or saved.get("num_attention_heads")
    topk = topk or saved.get("topk") or saved.get("moe_router_topk")
    if not heads or (reader.expert_layers and not topk):
        raise ConversionError(
            f"{reader.directory} does not say how many heads or experts per token the model has. Fix: give "
            "--num-attention-heads and --topk"
        )
    slots = {part.slot.key: part.slot for part in plan.parts}
    vocabulary, hidden = slots["embedding.word_embeddings.weight"].shape
    layers = 1 + max(int(m[1]) for m in map(LAYER_KEY.match, reader.shared[0]) if m)
    positions = slots.get("embedding.position_embeddings.weight")
    length = (
        positions.shape[0] if positions else saved.get("max_position_embeddings") or saved.get("seq_length") or 2048
    )
    arguments: dict[str, object] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "max_position_embeddings": length,
        "seq_length": min(length, saved.get("seq_length") or 4096),
        "padded_vocab_size": vocabulary,
        "position_embedding_type": "learned_absolute" if positions else "rope",
        "normalization": "LayerNorm" if "decoder.final_layernorm.bias" in slots else "RMSNorm",
        "layernorm_epsilon": saved.get("layernorm_epsilon", 1e-5),
        "add_bias_linear": False,
        "add_qkv_bias": any(key.endswith("linear_qkv.bias") for key in slots),
        "untie_embeddings_and_output_weights": "output_layer.weight" in slots,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    groups = saved.get("num_key_value_heads") or heads
    if groups != heads:
        arguments.update(group_query_attention=True, num_query_groups=groups)
    if not positions:
        arguments["rotary_base"] = int(saved.get("rotary_base") or saved.get("rope_theta") or 10000)
        arguments["rotary_percent"] = saved.get("rotary_percent") or 1.0
        rotated = int(hidden // heads * arguments["rotary_percent"])
        for name in filter(DERIVED.search, reader.shared[0]):
            check_frequencies(name, reader.shared[0][name], arguments["rotary_base"], rotated)
    return arguments | _feed_forward(reader, slots, layers, topk)


def _check_saved(reader: XMoEReader, saved: dict[str, object]) -> None:
    """Raises ConversionError for what the arguments say and Megatron-Core's model would compute differently."""
    if saved.get("apply_layernorm_1p"):
        raise ConversionError(
            f"{reader.directory} was saved with apply_layernorm_1p; norms that add one are not served"
        )
    version = reader.states[0].get("checkpoint_version")
    if isinstance(version, int | float) and version < 2:
        raise ConversionError(
            f"{reader.directory} has checkpoint_version {version}, which orders queries, keys and values otherwise; "
            "2 and later are converted"
        )
    shared = reader.shared[0]
    rotary = saved.get("use_rotary_position_embeddings") or any(map(DERIVED.search, shared))
    if rotary and any(name.endswith("position_embeddings.weight") for name in shared):
        raise ConversionError(
            f"{reader.directory} has learned positions and was trained with use_rotary_position_embeddings as well; "
            "Megatron-Core's model has one kind. Fix: none; train with --no-position-embedding"
        )


def _feed_forward(reader: XMoEReader, slots: dict[str, Slot], layers: int, topk: int | None) -> dict[str, object]:
    def matrix(name: str) -> Slot | None:
        return next((slot for key, slot in slots.items() if key.endswith(name)), None)

    expert, dense = (matrix(name) for name in ("mlp.experts.experts.linear_fc2.weight", ".mlp.linear_fc2.weight"))
    first = matrix("mlp.experts.experts.linear_fc1.weight") or matrix(".mlp.linear_fc1.weight")
    second = expert or dense
    arguments: dict[str, object] = {"ffn_hidden_size": (dense or expert).shape[1]}
    arguments["swiglu"] = first.shape[0] == 2 * second.shape[1]
    if getattr(reader.args, "squared_relu", False):
        arguments["squared_relu"] = True
    if expert:
        pft = any(getattr(reader.args, name, False) for name in ("use_uneven_all_to_all", "use_pft"))
        arguments |= {
            "moe_backend": "xmoe",
            "num_experts": reader.num_experts,
            "moe_ffn_hidden_size": expert.shape[1],
            "moe_router_topk": topk,
            # DeepSpeed's gate of two and more divides by the sum of the chosen, which is softmax over them alone
            "moe_router_pre_softmax": pft or topk == 1,
            "moe_router_dtype": "fp32",
        }
        if pft:
            arguments["xmoe_combine_weights"] = "logits"  # what X-MoE's own gate does, and the model was trained with
        pattern = [int(layer in reader.expert_layers) for layer in range(layers)]
        if not all(pattern):
            arguments["moe_layer_freq"] = pattern
    return arguments
