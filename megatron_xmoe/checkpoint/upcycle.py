"""A dense checkpoint -> a fine-grained Mixture of Experts that starts from its weights, by Megatron's own routine."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict
from torch import Tensor, nn

from megatron_xmoe.checkpoint.compare import is_megatron
from megatron_xmoe.checkpoint.convert import (
    SLACK_BYTES,
    Options,
    implementation,
    model_of_hf,
    precision,
    saved_arguments,
    write_arguments,
)
from megatron_xmoe.checkpoint.hf import HFReader
from megatron_xmoe.checkpoint.names import ConversionError, Slot, command_line, extra_states, few, norm_prefix
from megatron_xmoe.checkpoint.report import Report, check_new, new_folder
from megatron_xmoe.checkpoint.torch_dist import Piece, TorchDistReader, write_checkpoint
from megatron_xmoe.checkpoint.views import bits, cast

Placed = Iterator[tuple[Slot, Piece]]
FC1, FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"


@dataclass(frozen=True)
class Experts:
    """What the dense feed-forward layers become.

    Args:
        num_experts: in all; a multiple of granularity.
        granularity: into how many experts one copy of the dense layer is cut (X-MoE's segmentation factor m).
        topk: experts per token.
        pre_softmax: route by the softmax over all experts, not over the chosen ones.
        seed: of the router's random weights.
    """

    num_experts: int
    granularity: int = 1
    topk: int = 2
    pre_softmax: bool = False
    seed: int = 1234


@dataclass(frozen=True)
class _Dense:
    """A slice of a dense model."""

    slot: Slot
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Written:
    """Counts what is written and remembers its bits, for the verification."""

    report: Report
    digests: dict[tuple, str]


def upcycle(dense: Path, megatron: Path, experts: Experts, options: Options) -> Report:
    """Write a Mixture-of-Experts checkpoint made of a dense one.

    Args: dense, a HuggingFace or a Megatron checkpoint.

    Raises:
        ConversionError: it has experts already, or sizes do not divide; the output exists or cannot be written.
    """
    if not options.dry_run:
        check_new(megatron)
    slices, arguments = (_of_megatron if is_megatron(dense) else _of_hf)(dense, options)
    if arguments.get("num_experts"):
        raise ConversionError(f"{dense} has experts already. Fix: give a dense checkpoint")
    arguments = dict(arguments, **_new_arguments(arguments, experts))
    report = Report("Upcycling: dense -> experts", options.dry_run)
    digests: dict[tuple, str] = {}
    placed = list(_pieces(slices, arguments, experts, options, Written(report, digests)))
    pieces = [piece for _, piece in placed]
    arguments |= precision(pieces) | implementation(options)
    size = sum(piece.nbytes for piece in pieces)
    stored = [torch.Size(item.slot.shape).numel() * item.dtype.itemsize for item in slices]
    if options.dry_run:
        for nbytes in stored:
            report.count_read(nbytes)
        report.count_written(size, "copy or cut", len(pieces))
        return report
    with new_folder(megatron, size + SLACK_BYTES) as folder, report.progress(sum(stored)):
        write_checkpoint(folder, pieces, extra_states(slot for slot, _ in placed), arguments)
        write_arguments(folder, command_line(arguments))
        if options.verify:
            _verify(folder, pieces, digests, report)
    return report


def _of_hf(dense: Path, options: Options) -> tuple[list[_Dense], dict]:
    source = HFReader(dense)
    _, model = model_of_hf(source, options.implementation)

    def part(rule) -> _Dense:
        dtype = source.dtype(rule.sources[0])
        read = lambda: rule.join([cast(source.read(name), dtype, name) for name in rule.sources], model.dims)  # noqa: E731
        return _Dense(rule.slot, dtype, read)

    return [part(rule) for rule in model.rules], model.arguments


def _of_megatron(dense: Path, options: Options) -> tuple[list[_Dense], dict]:
    reader = TorchDistReader(dense)
    arguments = saved_arguments(dense, reader)
    if arguments.get("transformer_impl", "local") != options.implementation:
        raise ConversionError(
            f"{dense} was saved with --transformer-impl {arguments.get('transformer_impl')}. Fix: give the same here"
        )
    keys = reader.model_keys()
    if biases := [key for key in keys if key.endswith(("linear_fc1.bias", "linear_fc2.bias"))]:
        raise ConversionError(f"{dense} has {few(biases)}; experts here have no biases (--disable-bias-linear)")
    parts = []
    for key in keys:
        shape, stacked = reader.shape(key), key.startswith("decoder.layers.") and not key.split(".")[2].isdigit()
        for place in [(layer,) for layer in range(shape[0])] if stacked else [()]:
            slot = Slot(key, place, shape[: len(place)], shape[len(place) :])
            parts.append(_Dense(slot, reader.dtype(key), lambda slot=slot: _read(reader, slot)))
    return parts, arguments


def _read(reader: TorchDistReader, slot: Slot) -> Tensor:
    return reader.read(slot.key, slot.offsets, slot.sizes).reshape(slot.shape)


def _new_arguments(arguments: dict, experts: Experts) -> dict[str, object]:
    width, number, parts = arguments["ffn_hidden_size"], experts.num_experts, experts.granularity
    if width % parts or number % parts:
        raise ConversionError(
            f"--granularity {parts} must divide the feed-forward size {width} and --num-experts {number}"
        )
    if not 1 <= experts.topk <= number:
        raise ConversionError(f"--topk {experts.topk} must be between 1 and --num-experts {number}")
    return {
        "moe_backend": "xmoe",
        "num_experts": number,
        "moe_ffn_hidden_size": width // parts,
        "moe_router_topk": experts.topk,
        "moe_router_pre_softmax": experts.pre_softmax,
    }


def _pieces(slices: list[_Dense], arguments, experts: Experts, options: Options, written: Written) -> Placed:
    """What is written: the feed-forward layers cut into experts, everything else as it is."""
    latent = bool(arguments.get("multi_latent_attention"))
    before, after = (norm_prefix("pre_mlp_norm", options.implementation, latent, moe) for moe in (False, True))
    second = {(item.slot.key, item.slot.index): item for item in slices if item.slot.key.endswith(FC2)}
    found = [item for item in slices if item.slot.key.endswith(FC1)]
    if not found or len(found) != len(second):
        raise ConversionError(f"no pairs of {FC1} and {FC2} among {few(item.slot.key for item in slices)}")
    for item in slices:
        if item.slot.key.endswith(FC1):
            other = second[item.slot.key.replace(FC1, FC2), item.slot.index]
            yield from _expert_pieces(item, other, arguments, experts, options, written)
        elif not item.slot.key.endswith(FC2):
            slot = (
                replace(item.slot, key=item.slot.key.replace(before, after)) if before in item.slot.key else item.slot
            )
            yield _piece(slot, options.dtype_of(slot.key, item.dtype), item.read, written)


def _piece(
    slot: Slot, dtype: torch.dtype, read: Callable[[], Tensor], written: Written, what: str = "copy"
) -> tuple[Slot, Piece]:
    def make() -> Tensor:
        source = read()
        if what == "copy":
            written.report.count_read(source.nbytes)
        tensor = cast(source, dtype, str(slot))
        written.report.count_written(tensor.nbytes, what)
        written.digests[slot.key, slot.offsets] = digest(tensor)
        return tensor

    return slot, Piece(slot.key, slot.offsets, slot.sizes, slot.global_shape, dtype, make)


def digest(tensor: Tensor) -> str:
    """A fingerprint of a tensor's bits."""
    return hashlib.sha256(bits(tensor).reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _expert_pieces(fc1: _Dense, fc2: _Dense, arguments, experts: Experts, options: Options, written: Written) -> Placed:
    """The experts and the router of one layer; the layer is cut once, when the first of them is written."""
    made: dict[str, Tensor] = {}
    layer = fc1.slot.index[0] if fc1.slot.index else int(fc1.slot.key.split(".")[2])
    dtype = options.dtype_of(fc1.slot.key, fc1.dtype)
    number, parts = experts.num_experts, experts.granularity

    def get(name: str) -> Tensor:
        if not made:
            written.report.count_read(sum(torch.Size(d.slot.shape).numel() * d.dtype.itemsize for d in (fc1, fc2)), 2)
            made.update(cut(fc1.read(), fc2.read(), layer, arguments, experts))
        return made.pop(name)

    hidden = fc2.slot.shape[0]
    shapes = {"linear_fc1": (fc1.slot.shape[0] // parts, hidden), "linear_fc2": (hidden, fc2.slot.shape[1] // parts)}
    prefix = fc1.slot.key.removesuffix(FC1)
    router = Slot(f"{prefix}mlp.router.weight", fc1.slot.index, fc1.slot.axes, (number, hidden))
    yield _piece(router, dtype, lambda: get("mlp.router.weight"), written, "new router")
    for name, shape in shapes.items():
        for expert in range(number):
            slot = Slot(
                f"{prefix}mlp.experts.experts.{name}.weight",
                (*fc1.slot.index, expert),
                (*fc1.slot.axes, number),
                shape,
            )
            key = f"mlp.experts.local_experts.{expert}.{name}.weight"
            yield _piece(slot, dtype, lambda key=key: get(key), written, "cut of a dense layer")


def cut(fc1: Tensor, fc2: Tensor, layer: int, arguments: dict, experts: Experts) -> dict[str, Tensor]:
    """One layer's experts and router, by Megatron's upcycling (arXiv:2410.07524).

    Args: fc1 [F or 2F, H] and fc2 [H, F] of the dense layer; layer, which seeds the router.

    Returns:
        Megatron's names of SequentialMLP -> tensors.
    """
    generator = torch.Generator().manual_seed(experts.seed + layer)
    std = arguments.get("init_method_std") or 0.02
    router = torch.randn(experts.num_experts, fc2.shape[0], generator=generator) * std
    activation = SimpleNamespace(__name__="silu" if arguments.get("swiglu") else "gelu")
    if arguments.get("squared_relu"):
        activation = SimpleNamespace(__name__="squared_relu")
    config = SimpleNamespace(
        num_moe_experts=experts.num_experts,
        gated_linear_unit=bool(arguments.get("swiglu")),
        moe_router_topk=experts.topk,
        moe_router_pre_softmax=experts.pre_softmax,
        moe_ffn_hidden_size=arguments["moe_ffn_hidden_size"],
        ffn_hidden_size=arguments["ffn_hidden_size"],
        activation_func=activation,
    )
    sparse = _Shape(_shape_of_experts(config), {"mlp.router.weight": nn.Parameter(router)})
    dense = _Shape(_Shape(None, {}, config), {FC1: fc1, FC2: fc2})
    return upcycle_state_dict([sparse], [dense])["model"]


class _Shape(nn.Module):
    """As much of a model as Megatron's routine looks at: a module `mlp`, and the state."""

    def __init__(self, mlp: nn.Module | None, state: dict[str, Tensor], config=None):
        super().__init__()
        self.mlp, self.state, self.config = mlp, state, config

    def state_dict(self) -> dict[str, Tensor]:
        """What was given."""
        return self.state


def _shape_of_experts(config: SimpleNamespace) -> nn.Module:
    """A layer with experts and no parameters, on one expert-parallel rank."""
    layer, experts = MoELayer.__new__(MoELayer), SequentialMLP.__new__(SequentialMLP)
    nn.Module.__init__(layer)
    nn.Module.__init__(experts)
    layer.config, layer.num_local_experts = config, config.num_moe_experts
    layer.ep_group, layer.experts = SimpleNamespace(rank=lambda: 0), experts
    return layer


def _verify(folder: Path, pieces: list[Piece], digests: dict[tuple, str], report: Report) -> None:
    target = TorchDistReader(folder)
    for piece in pieces:
        if digest(target.read(piece.key, piece.offsets, piece.sizes)) != digests[piece.key, piece.offsets]:
            raise ConversionError(f"verification: {piece.key} at {piece.offsets} does not hold what was written")
    report.notes.append(f"verified: {len(pieces)} slices were read again and hold what was written")
