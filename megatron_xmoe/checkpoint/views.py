"""A Megatron checkpoint seen under HuggingFace's names."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_xmoe.checkpoint.families import Config, load_config
from megatron_xmoe.checkpoint.families.base import spell_out
from megatron_xmoe.checkpoint.hf import read_json
from megatron_xmoe.checkpoint.names import IMPLEMENTATIONS, ConversionError, Model, Rule, few
from megatron_xmoe.checkpoint.saved import compare_with_saved
from megatron_xmoe.checkpoint.torch_dist import TorchDistReader

HF_FOLDER = "hf"  # beside a converted checkpoint: the configuration and tokenizer of its source
RECORD = "conversion.json"


def prediction_layers(config: Config) -> int:
    """Multi-token-prediction layers that a configuration counts."""
    return getattr(config, "num_nextn_predict_layers", None) or getattr(config, "num_mtp_layers", None) or 0


def predictions_in(config: Config, names: set[str]) -> int:
    """Multi-token-prediction layers that a HuggingFace checkpoint holds: all that the config counts, or none."""
    count, first = prediction_layers(config), config.num_hidden_layers
    present = any(name.startswith(f"model.layers.{first + i}.") for name in names for i in range(count))
    return count if present else 0


def bits(tensor: Tensor) -> Tensor:
    """Values as integers, so that NaNs and signed zeros compare as they are stored."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Values in another data type.

    Args: name, for the error.

    Raises:
        ConversionError: a finite value would become infinite.
    """
    result = tensor.to(dtype)
    if dtype != tensor.dtype and dtype.is_floating_point and bool((result.isinf() & tensor.isfinite()).any()):
        largest = tensor.abs().nan_to_num(posinf=0).max().item()
        raise ConversionError(
            f"{name} holds {largest:.4g}, which is infinite in {str(dtype).removeprefix('torch.')}. Fix: choose "
            "another --dtype"
        )
    return result


class MegatronAsHF:
    """A Megatron checkpoint under HuggingFace's names, for conversion and comparison."""

    def __init__(self, megatron: Path, hf_config: Path | None = None):
        """Opens a checkpoint.

        Args: hf_config, config.json or its folder, where the checkpoint brings none.

        Raises:
            ConversionError: no config, or tensors that it does not lead to.
        """
        self.reader = TorchDistReader(megatron)
        # the parent belongs to the checkpoint only if one of its iterations was given, not the checkpoint itself
        given = megatron.resolve()
        home = given.parent if re.fullmatch(r"release|iter_\d+", given.name) else megatron
        folder = hf_config or (home / HF_FOLDER if (home / HF_FOLDER).is_dir() else None)
        if folder is None:
            raise ConversionError(
                f"{megatron} brings no HuggingFace configuration ({HF_FOLDER}/config.json). Fix: give --hf-config DIR"
            )
        self.config_path = folder / "config.json" if folder.is_dir() else folder
        self.config = read_json(self.config_path)
        self.family, config = load_config(self.config, str(self.config_path))
        self.model = self._model(config)
        compare_with_saved(self.model.arguments, self.reader, self.config_path)
        self._check()
        record = home / RECORD
        copies = read_json(record).get("copies", {}) if record.is_file() else self._usual_copies()
        self.copies = {copy: of for copy, of in self.model.aliases.items() if copy in copies}
        self.rules = {name: (rule, i) for rule in self.model.rules for i, name in enumerate(rule.sources)}
        self._split: tuple[Rule, list[Tensor]] | None = None

    def _model(self, config: Config) -> Model:
        """The model under the implementation's names that the checkpoint uses."""
        keys = set(self.reader.model_keys())
        predictions = prediction_layers(config) if any(key.startswith("mtp.") for key in keys) else 0
        models = [spell_out(self.family, config, implementation, predictions) for implementation in IMPLEMENTATIONS]
        models += [_unstacked(model) for model in models]
        return min(models, key=lambda model: len({rule.slot.key for rule in model.rules} ^ keys))

    def _usual_copies(self) -> set[str]:
        """Of a checkpoint that was not converted: multi-token prediction has copies, tied embeddings none."""
        return set(self.model.aliases) - {"lm_head.weight"}

    def _check(self) -> None:
        where, keys = self.reader.folder, {rule.slot.key for rule in self.model.rules}
        present = set(self.reader.model_keys())
        if missing := [key for key in dict.fromkeys(rule.slot.key for rule in self.model.rules) if key not in present]:
            raise ConversionError(f"{where} lacks {few(missing)}, which {self.family.name} needs")
        if unmatched := sorted(present - keys):
            raise ConversionError(f"{where} holds {few(unmatched)}, which no line of {self.family.name} matches")
        for rule in self.model.rules:
            shape, wanted = self.reader.shape(rule.slot.key), rule.slot.global_shape
            padded = rule.vocabulary and shape[0] >= wanted[0] and shape[1:] == wanted[1:]
            if shape != wanted and not padded:
                raise ConversionError(f"{where}: {rule.slot.key} has the shape {shape}; config.json leads to {wanted}")

    def names(self) -> list[str]:
        """HuggingFace's names."""
        return [*self.rules, *self.copies]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        rule, i = self.rules[self.copies.get(name, name)]
        return rule.shapes[i]

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor."""
        return self.reader.dtype(self.rules[self.copies.get(name, name)][0].slot.key)

    def read(self, name: str) -> Tensor:
        """A tensor; those that share a slice of Megatron's are best read one after another."""
        rule, i = self.rules[self.copies.get(name, name)]
        if self._split is None or self._split[0] is not rule:
            slot = rule.slot
            self._split = None
            stored = self.reader.read(slot.key, slot.offsets, slot.sizes).reshape(slot.shape)
            self._split = rule, rule.split(stored, self.model.dims)
        return self._split[1][i]


def _unstacked(model: Model) -> Model:
    """The same model with a key for each layer, as Megatron saves it where layers are not all alike."""

    def own_key(rule: Rule) -> Rule:
        slot = rule.slot
        if not slot.key.startswith("decoder.layers.") or not slot.index or slot.key.split(".")[2].isdigit():
            return rule
        key = slot.key.replace("decoder.layers.", f"decoder.layers.{slot.index[0]}.", 1)
        return replace(rule, slot=replace(slot, key=key, index=slot.index[1:], axes=slot.axes[1:]))

    return replace(model, rules=[own_key(rule) for rule in model.rules])
