"""Checkpoints of the original X-MoE and of DeepSpeed-MoE under Megatron-DeepSpeed, one file for each expert.

`mp_rank_XX_model_states.pt` holds a tensor-parallel rank's share of everything but the experts;
`layer_L_expert_E_mp_rank_XX_model_states.pt` holds expert E of the L-th layer that has experts (dense layers are not
counted). Experts have two matrices.
"""

import contextlib
import pickle
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_xmoe.checkpoint.names import ConversionError, Slot, few, layer_key

_SHARED = re.compile(r"^mp_rank_(\d{2})_model_states\.pt$")
_EXPERT = re.compile(r"^layer_(\d+)_expert_(\d+)_mp_rank_(\d{2})_model_states\.pt$")
_EXPERT_KEY = re.compile(
    r"^language_model\.encoder\.layers\.(\d+)\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)$"
)
LAYER_KEY = re.compile(r"^language_model\.encoder\.layers\.(\d+)\.(.+)$")
DERIVED = re.compile(r"rotary_pos_emb\.inv_freq$")

# Megatron-DeepSpeed's name -> (Megatron-Core's, dimension that tensor-parallel ranks share; None: each has it whole)
MODEL = {
    "language_model.embedding.word_embeddings.weight": ("embedding.word_embeddings.weight", 0),
    "language_model.embedding.position_embeddings.weight": ("embedding.position_embeddings.weight", None),
    "language_model.encoder.final_layernorm.weight": ("decoder.final_layernorm.weight", None),
    "language_model.encoder.final_layernorm.bias": ("decoder.final_layernorm.bias", None),
    "language_model.output_layer.weight": ("output_layer.weight", 0),
}
LAYER = {
    "input_layernorm.weight": ("<input_norm>.weight", None),
    "input_layernorm.bias": ("<input_norm>.bias", None),
    "self_attention.query_key_value.weight": ("self_attention.linear_qkv.weight", 0),
    "self_attention.query_key_value.bias": ("self_attention.linear_qkv.bias", 0),
    "self_attention.dense.weight": ("self_attention.linear_proj.weight", 1),
    "post_attention_layernorm.weight": ("<pre_mlp_norm>.weight", None),
    "post_attention_layernorm.bias": ("<pre_mlp_norm>.bias", None),
    "mlp.dense_h_to_4h.weight": ("mlp.linear_fc1.weight", 0),
    "mlp.dense_4h_to_h.weight": ("mlp.linear_fc2.weight", 1),
    "mlp.deepspeed_moe.gate.wg.weight": ("mlp.router.weight", None),
}
EXPERT = {
    "dense_h_to_4h.weight": ("mlp.experts.experts.linear_fc1.weight", 0),
    "dense_4h_to_h.weight": ("mlp.experts.experts.linear_fc2.weight", 1),
}
# Biases that the entry script's model does not have: zero ones go, others are refused. The second bias of an expert
# is never added by the original code, whatever its value.
ZERO_BIASES = ("self_attention.dense.bias", "mlp.dense_h_to_4h.bias", "mlp.dense_4h_to_h.bias", "dense_h_to_4h.bias")
UNUSED_BIASES = ("dense_4h_to_h.bias",)


@dataclass(frozen=True)
class Part:
    """A slice of Megatron's checkpoint and how to make it."""

    slot: Slot
    dtype: torch.dtype
    read: Callable[[], Tensor]
    sources: int  # tensors that it is made of


class XMoEReader:
    """An original checkpoint; the files are mapped, and read when a tensor is asked for."""

    def __init__(self, directory: Path, trust_pickle: bool = False):
        """Opens a checkpoint.

        Args: directory, with `latest` or with the files; trust_pickle, run whatever the files ask for.

        Raises:
            ConversionError: files are missing, damaged, or want to run code.
        """
        latest = directory / "latest"
        if latest.is_file():
            tag = latest.read_text(errors="replace").strip()
            if Path(tag).name != tag or not (directory / tag).is_dir():
                raise ConversionError(f"{latest} names {tag[:60]!r}, and there is no such folder")
            directory = directory / tag
        if not directory.is_dir():
            raise ConversionError(f"{directory} is not a folder. Fix: check the path")
        self.directory, self.trust = directory, trust_pickle
        names = [path.name for path in directory.iterdir()]
        ranks = sorted(int(match[1]) for match in map(_SHARED.match, names) if match)
        if not ranks or ranks != list(range(len(ranks))):
            raise ConversionError(f"{directory} has mp_rank files for ranks {ranks}; it must have 00, 01, ... in full")
        self.states = [self._load(f"mp_rank_{rank:02d}_model_states.pt") for rank in ranks]
        self.shared = [self._module(state) for state in self.states]
        self.args = next((s["args"] for s in self.states if isinstance(s.get("args"), Namespace)), Namespace())
        self._list_experts(names)
        self._check_ranks()

    def _load(self, name: str) -> dict:
        path = self.directory / name
        options = {"map_location": "cpu", "weights_only": not self.trust}
        try:
            with _namespaces_are_safe():
                try:
                    state = torch.load(path, mmap=True, **options)
                except RuntimeError as error:
                    if "mmap" not in str(error):
                        raise
                    state = torch.load(path, **options)  # torch's format before 1.6 cannot be mapped
        except pickle.UnpicklingError as error:
            raise ConversionError(self._refusal(path, error)) from error
        except Exception as error:  # damaged zip files fail in many ways
            raise ConversionError(f"{path} is damaged or cut off ({_short(error)}). Fix: copy it again") from error
        if not isinstance(state, dict):
            raise ConversionError(f"{path} holds a {type(state).__name__}, not a dictionary")
        return state

    def _refusal(self, path: Path, error: Exception) -> str:
        wants = re.search(r"Unsupported (?:global|class|operand)[^\n]*|GLOBAL [\w.]+", str(error))
        if not wants:
            return f"{path} is damaged ({_short(error)}). Fix: copy it again"
        return (
            f"{path} needs more than tensors ({wants[0][:200]}), and loading that may run code of whoever made the "
            "file; nothing was run. Fix: --trust-pickle, if you trust them"
        )

    def _module(self, state: dict) -> dict[str, Tensor]:
        module = state.get("module")
        if not isinstance(module, dict):
            raise ConversionError(f"{self.directory}: an mp_rank file has no 'module'; is it a DeepSpeed checkpoint?")
        return dict(_flat(module))

    def _list_experts(self, names: Iterable[str]) -> None:
        """Layer and expert -> the files of the tensor-parallel ranks; the layer is that of the keys in the file."""
        files: dict[tuple[int, int], dict[int, str]] = defaultdict(dict)
        for name in names:
            if match := _EXPERT.match(name):
                files[int(match[1]), int(match[2])][int(match[3])] = name
            elif "expert" in name and name.endswith("model_states.pt"):
                raise ConversionError(f"{self.directory / name}: not a name of the form layer_L_expert_E_mp_rank_XX")
        gates = sorted(int(m[1]) for m in map(LAYER_KEY.match, self.shared[0]) if m and m[2].endswith("gate.wg.weight"))
        self.expert_layers, self.files = gates, files
        self.num_experts = max((expert for _, expert in files), default=-1) + 1
        wanted = {(layer, expert) for layer in range(len(gates)) for expert in range(self.num_experts)}
        if missing := sorted(wanted - files.keys()):
            lost = few(f"layer_{layer}_expert_{expert}" for layer, expert in missing)
            raise ConversionError(f"{self.directory} lacks the files {lost}")
        if extra := sorted(files.keys() - wanted):
            lost = few(f"layer_{layer}_expert_{expert}" for layer, expert in extra)
            raise ConversionError(f"{self.directory} has the files {lost}, and only {len(gates)} layers with a gate")

    def _check_ranks(self) -> None:
        names = set(self.shared[0])
        for rank, shared in enumerate(self.shared):
            if unlike := sorted(names ^ set(shared)):
                raise ConversionError(f"{self.directory}: mp_rank_{rank:02d} and mp_rank_00 differ in {few(unlike)}")
        for place, ranks in self.files.items():
            if sorted(ranks) not in ([0], list(range(len(self.shared)))):
                raise ConversionError(f"{self.directory}: layer_{place[0]}_expert_{place[1]} lacks some mp_rank files")

    def expert(self, moe_layer: int, expert: int) -> list[dict[str, Tensor]]:
        """An expert's tensors on each tensor-parallel rank, by their names in the expert.

        Raises:
            ConversionError: the file holds something else.
        """
        layer, ranks = self.expert_layers[moe_layer], []
        for _, name in sorted(self.files[moe_layer, expert].items()):
            tensors = {}
            for key, tensor in _flat(self._load(name)):
                match = _EXPERT_KEY.match(key)
                if not match or (int(match[1]), int(match[2])) != (layer, expert):
                    raise ConversionError(
                        f"{self.directory / name} holds {key}; expert {expert} of layer {layer} was expected"
                    )
                tensors[match[3]] = tensor
            ranks.append(tensors)
        return ranks


def _namespaces_are_safe():
    """Lets torch's weights-only unpickler make argparse namespaces, which Megatron's arguments are."""
    if Namespace in torch.serialization.get_safe_globals():  # Megatron's doing; torch's context would end that, too
        return contextlib.nullcontext()
    return torch.serialization.safe_globals([Namespace])


def _flat(tree: dict, prefix: str = "") -> Iterable[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif value is not None:
            raise ConversionError(f"{prefix}{key} is a {type(value).__name__}, not a tensor")


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def merge(parts: list[Tensor], dim: int | None, name: str, gated: bool = False) -> Tensor:
    """One tensor of the shares of tensor-parallel ranks.

    Args: dim, that is shared, None if every rank has all; gated, each share is a gate and another half.

    Raises:
        ConversionError: the ranks should be equal and are not.
    """
    if len(parts) == 1:
        return parts[0]
    if dim is None:
        if not all(torch.equal(parts[0], part) for part in parts[1:]):
            raise ConversionError(f"{name} differs between mp_rank files; it must be the same in all")
        return parts[0]
    if gated:
        return torch.cat([torch.cat(halves) for halves in zip(*(part.chunk(2) for part in parts), strict=True)])
    return torch.cat(parts, dim=dim)


def spell_layer(reader: XMoEReader, layer: int, implementation: str) -> dict[str, tuple[str, int | None]]:
    """Source name -> (key below the layer, shared dimension) of what the mp_rank files hold of one layer."""
    experts = layer in reader.expert_layers
    return {
        f"language_model.encoder.layers.{layer}.{name}": (layer_key(key, implementation, False, experts), dim)
        for name, (key, dim) in LAYER.items()
    }
