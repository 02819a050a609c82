"""Looking into checkpoints: what one holds, and in what two of them differ."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_xmoe.checkpoint.families import load_config
from megatron_xmoe.checkpoint.hf import HFReader
from megatron_xmoe.checkpoint.names import ConversionError
from megatron_xmoe.checkpoint.torch_dist import TRACKER, TorchDistReader
from megatron_xmoe.checkpoint.views import MegatronAsHF, bits

EXPERTS = ".experts.experts."


class Source(Protocol):
    """Tensors by name."""

    def names(self) -> list[str]:
        """All of them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""

    def dtype(self, name: str) -> torch.dtype:
        """Data type of one."""

    def read(self, name: str) -> Tensor:
        """Values of one."""


class MegatronBySlice:
    """A Megatron checkpoint's model under names with the number of the layer, and of the expert in brackets.

    So it is the same whether layers are stored stacked or one by one.
    """

    def __init__(self, directory: Path):
        """Opens a checkpoint; raises ConversionError as TorchDistReader does."""
        self.reader = TorchDistReader(directory)
        self.places: dict[str, tuple[str, tuple[int, ...]]] = {}
        for key in self.reader.model_keys():
            shape = self.reader.shape(key)
            stacked = key.startswith("decoder.layers.") and not key.split(".")[2].isdigit()
            leading = stacked + (EXPERTS in key)
            for place in itertools.product(*map(range, shape[:leading])):
                name = key
                if stacked:
                    name = key.replace("decoder.layers.", f"decoder.layers.{place[0]}.", 1)
                if EXPERTS in key:
                    name += f"[{place[-1]}]"
                self.places[name] = key, place

    def names(self) -> list[str]:
        """All of them."""
        return list(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a slice."""
        key, place = self.places[name]
        return self.reader.shape(key)[len(place) :]

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a slice."""
        return self.reader.dtype(self.places[name][0])

    def read(self, name: str) -> Tensor:
        """Values of a slice."""
        key, place = self.places[name]
        shape = self.shape(name)
        offsets = (*place, *(0 for _ in shape))
        return self.reader.read(key, offsets, (*(1 for _ in place), *shape)).reshape(shape)


def is_megatron(directory: Path) -> bool:
    """Whether a folder looks like a torch_dist checkpoint rather than a HuggingFace one."""
    return (directory / TRACKER).is_file() or (directory / "metadata.json").is_file()


def open_both(first: Path, second: Path) -> tuple[Source, Source]:
    """Two checkpoints under the same kind of names: HuggingFace's if one of them is HuggingFace's."""
    for directory in (first, second):
        if not directory.is_dir():
            raise ConversionError(f"{directory} is not a folder. Fix: check the path")
    kinds = is_megatron(first), is_megatron(second)
    if kinds == (True, True):
        return MegatronBySlice(first), MegatronBySlice(second)
    return tuple(
        MegatronAsHF(directory, other) if megatron else HFReader(directory)
        for directory, other, megatron in ((first, second, kinds[0]), (second, first, kinds[1]))
    )


def differences(first: Source, second: Source) -> Iterator[str]:
    """A line for each tensor that is not the same in both, bit for bit."""
    names, others = first.names(), set(second.names())
    for name in names:
        if name not in others:
            yield f"{name}: only in the first"
        elif first.shape(name) != second.shape(name):
            yield f"{name}: shape {first.shape(name)} and {second.shape(name)}"
        else:
            yield from _values(name, first, second)
    yield from (f"{name}: only in the second" for name in sorted(others - set(names)))


def _values(name: str, first: Source, second: Source) -> Iterator[str]:
    one, two = first.read(name), second.read(name)
    if one.dtype != two.dtype:
        yield f"{name}: {one.dtype} and {two.dtype}"
    elif not torch.equal(bits(one), bits(two)):
        worst = (one.double() - two.double()).abs().max().item()
        yield f"{name}: values differ by up to {worst:.3g}"


def describe(directory: Path, every_tensor: bool) -> str:
    """What a checkpoint is and holds, as text.

    Args: every_tensor, list each tensor, too.

    Raises:
        ConversionError: it cannot be read.
    """
    if not directory.is_dir():
        raise ConversionError(f"{directory} is not a folder. Fix: check the path")
    if is_megatron(directory):
        source, lines = MegatronBySlice(directory), [f"{directory}: Megatron, torch_dist"]
        lines += _megatron_lines(source.reader)
    else:
        source = HFReader(directory)
        family, config = load_config(source.config, str(directory / "config.json"))
        lines = [f"{directory}: HuggingFace, {family.name}", f"  layers {config.num_hidden_layers}"]
        if source.scales:
            lines.append(f"  {len(source.scales)} matrices are block-quantised to eight bits")
    names = source.names()
    parameters = sum(torch.Size(source.shape(name)).numel() for name in names)
    lines.append(f"  tensors {len(names)}, values {parameters}")
    kinds = Counter(str(source.dtype(name)).removeprefix("torch.") for name in names)
    lines.append("  " + ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common()))
    if every_tensor:
        lines += [f"  {name} {list(source.shape(name))} {source.dtype(name)}" for name in names]
    return "\n".join(lines)


def _megatron_lines(reader: TorchDistReader) -> list[str]:
    common = reader.common()
    arguments = vars(common["args"]) if "args" in common else {}
    shown = ("num_layers", "hidden_size", "num_attention_heads", "num_experts", "moe_router_topk", "moe_backend")
    lines = [f"  folder {reader.folder.name}, iteration {common.get('iteration', '?')}"]
    lines += [f"  {name} {arguments[name]}" for name in shown if arguments.get(name) is not None]
    optimizer = len(reader.tensors) - len(reader.model_keys())
    return [*lines, f"  optimizer tensors {optimizer}"]
