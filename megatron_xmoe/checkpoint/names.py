"""Where a tensor lives: symbolic tables of a family, spelled out into every tensor of a model and its two names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor

from megatron_xmoe.checkpoint.transforms import COPY, Dims, Shape, Transform


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message holds the name, the rule and the fix."""


@dataclass(frozen=True)
class Entry:
    """A line of a table: one tensor of Megatron and the HuggingFace tensors that hold the same values.

    Args:
        megatron: name below the layer. Norms whose name depends on the implementation are written `<role>.weight`,
            see NORMS.
        hf: pairs of a name below the layer, with `{e}` for the number of an expert, and a shape in dimension letters.
        transform: what is done to the values.
    """

    megatron: str
    hf: tuple[tuple[str, str], ...]
    transform: Transform = COPY

    @property
    def per_expert(self) -> bool:
        """Whether there is one such tensor for each expert."""
        return "{e}" in self.hf[0][0]


def entry(megatron: str, *hf: str, transform: Transform = COPY) -> Entry:
    """An Entry from "name: letters" strings."""
    pairs = tuple((name.strip(), letters.strip()) for name, _, letters in (text.partition(":") for text in hf))
    return Entry(megatron, pairs, transform)


IMPLEMENTATIONS = ("local", "transformer_engine")

# role -> (implementation, latent attention, layer with experts) -> prefix of the parameter's name on disk
_FUSED_QKV, _FUSED_FC1 = "self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"


def norm_prefix(role: str, implementation: str, latent: bool, experts: bool) -> str:
    """Prefix of a norm's parameters: Transformer Engine fuses norms with the linear layer that follows.

    Args: role, one of input_norm, pre_mlp_norm, q_norm, kv_norm (the last two of latent attention).
    """
    engine = implementation == "transformer_engine"
    if role == "input_norm":
        return "input_layernorm." if latent else _FUSED_QKV
    if role == "pre_mlp_norm":
        if engine:
            return "pre_mlp_layernorm." if experts else _FUSED_FC1
        return "pre_mlp_layernorm." if latent else _FUSED_FC1
    linear = {"q_norm": "linear_q_up_proj.layer_norm_", "kv_norm": "linear_kv_up_proj.layer_norm_"}[role]
    own = {"q_norm": "q_layernorm.", "kv_norm": "kv_layernorm."}[role]
    return f"self_attention.{linear if engine else own}"


_ROLE = re.compile(r"<(\w+)>\.(weight|bias)$")


def layer_key(name: str, implementation: str, latent: bool, experts: bool) -> str:
    """The name below the layer on disk, with norm roles spelled out."""
    match = _ROLE.match(name)
    return norm_prefix(match[1], implementation, latent, experts) + match[2] if match else name


@dataclass(frozen=True)
class Slot:
    """A place in a torch_dist checkpoint: a slice of a global tensor.

    Args:
        key: of the global tensor.
        index: place of the slice along the leading axes (layer, expert).
        axes: lengths of the leading axes.
        shape: of the slice.
    """

    key: str
    index: Shape
    axes: Shape
    shape: Shape

    @property
    def offsets(self) -> Shape:
        """First element of the slice in the global tensor."""
        return (*self.index, *(0 for _ in self.shape))

    @property
    def sizes(self) -> Shape:
        """Extent of the slice in the global tensor."""
        return (*(1 for _ in self.axes), *self.shape)

    @property
    def global_shape(self) -> Shape:
        """Shape of the global tensor."""
        return (*self.axes, *self.shape)

    def __str__(self) -> str:
        return f"{self.key}[{', '.join(map(str, self.index))}]" if self.index else self.key


@dataclass(frozen=True)
class Rule:
    """One slice of Megatron's and the HuggingFace tensors with the same values."""

    slot: Slot
    sources: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transform: Transform
    vocabulary: bool = False  # further rows may follow on Megatron's side, as padding

    def join(self, parts: list[Tensor], dims: Dims) -> Tensor:
        """Megatron's slice."""
        return self.transform.join(parts, dims)

    def split(self, tensor: Tensor, dims: Dims) -> list[Tensor]:
        """The HuggingFace tensors."""
        return self.transform.split(tensor, dims)


@dataclass(frozen=True)
class Model:
    """All tensors of one model.

    Args:
        rules: in the order of the model.
        dims: the dimension letters.
        aliases: HuggingFace names of second copies -> the tensor that they repeat.
        arguments: Megatron's arguments that rebuild the model, by destination.
    """

    rules: list[Rule]
    dims: Dims
    aliases: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, object] = field(default_factory=dict)


def shape_of(letters: str, dims: Dims) -> Shape:
    """(3, 5) for "A B" with A = 3 and B = 5."""
    return tuple(dims[letter] for letter in letters.split())


def rules_of(
    entries: Iterable[Entry], dims: Dims, key: str, hf: str, axes: tuple[Shape, Shape] = ((), ())
) -> Iterable[Rule]:
    """Spell out the entries of one layer, or of the model around the layers.

    Args:
        entries: lines of the table, norm roles resolved.
        dims: dimension letters; "E" counts the experts.
        key: prefix of Megatron's keys.
        hf: prefix of HuggingFace's names.
        axes: index and lengths of the leading axes that all tensors of the layer have (empty, or the layer's).
    """
    index, lengths = axes
    for line in entries:
        shapes = tuple(shape_of(letters, dims) for _, letters in line.hf)
        shape = line.transform.shape(shapes)
        experts = range(dims["E"]) if line.per_expert else (None,)
        for expert in experts:
            place = (index, lengths) if expert is None else ((*index, expert), (*lengths, dims["E"]))
            names = tuple(hf + name.format(e=expert) for name, _ in line.hf)
            vocabulary = line.hf[0][1].split()[0] == "V"
            yield Rule(Slot(key + line.megatron, *place, shape), names, shapes, line.transform, vocabulary)


_LINEAR = re.compile(r"\.(linear_\w+|eh_proj)\.weight$")


def extra_states(slots: Iterable[Slot]) -> list[str]:
    """Names of the empty extra states that Megatron's linear layers look for in a checkpoint."""
    names = []
    for slot in slots:
        if _LINEAR.search(slot.key):
            index, axes = (".".join(map(str, part)) for part in (slot.index or (0,), slot.axes or (1,)))
            names.append(f"{slot.key.removesuffix('weight')}_extra_state/shard_{index}_{axes}")
    return names


# What Megatron's arguments say about the model itself, as against its training.
MODEL_ARGUMENTS = """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention num_query_groups
    max_position_embeddings seq_length padded_vocab_size position_embedding_type rotary_base rotary_percent rope_type
    rotary_scaling_factor mscale mscale_all_dim rotary_interleaved use_rope_scaling swiglu squared_relu quick_geglu
    normalization layernorm_epsilon add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm
    untie_embeddings_and_output_weights attention_dropout hidden_dropout init_method_std
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    moe_backend num_experts moe_ffn_hidden_size moe_layer_freq moe_router_topk moe_router_pre_softmax
    moe_router_score_function moe_router_enable_expert_bias moe_router_topk_scaling_factor moe_router_num_groups
    moe_router_group_topk moe_router_dtype moe_shared_expert_intermediate_size moe_shared_expert_gate mtp_num_layers
    moe_apply_probs_on_input moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy
    xmoe_min_capacity xmoe_combine_weights xmoe_group_score xmoe_qk_norm transformer_impl bf16 fp16
""".split()

# What changes a model and is not carried over -> the value that does not.
NOT_SERVED: dict[str, object] = {
    "window_size": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "rotary_seq_len_interpolation_factor": None,
}

# Options that the command line spells otherwise than their destination.
_SPELLINGS = {"layernorm_epsilon": "--norm-epsilon"}
_NEGATIVE = {"add_bias_linear": "--disable-bias-linear"}


def command_line(arguments: Mapping[str, object]) -> list[str]:
    """Megatron's arguments as words of a command line; None and False are left out."""
    words = []
    for name, value in arguments.items():
        if name in _NEGATIVE:
            words += [] if value else [_NEGATIVE[name]]
        elif value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            text = _pattern(value) if isinstance(value, list) else str(value)
            words += [_SPELLINGS.get(name, f"--{name.replace('_', '-')}"), text]
    return words


def _pattern(values: list[int]) -> str:
    """([0]*1+[1]*26): unlike [0,1,1], no name of a file that a shell could put in its place."""
    return "(" + "+".join(f"[{value}]*{len(list(run))}" for value, run in groupby(values)) + ")"


def few(names: Iterable[str], limit: int = 5) -> str:
    """The first names of many, and how many there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
