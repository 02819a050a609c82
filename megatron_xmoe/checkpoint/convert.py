"""HuggingFace <-> Megatron, tensor by tensor: everything is named and counted before anything is written."""

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_xmoe.checkpoint.families import Family, load_config
from megatron_xmoe.checkpoint.families.base import spell_out
from megatron_xmoe.checkpoint.hf import HFReader, Output, read_json, side_files, write_shards
from megatron_xmoe.checkpoint.names import (
    MODEL_ARGUMENTS,
    NOT_SERVED,
    ConversionError,
    Model,
    command_line,
    extra_states,
    few,
)
from megatron_xmoe.checkpoint.report import Report, check_new, new_folder
from megatron_xmoe.checkpoint.saved import check_frequencies
from megatron_xmoe.checkpoint.torch_dist import Piece, TorchDistReader, write_checkpoint
from megatron_xmoe.checkpoint.views import HF_FOLDER, RECORD, MegatronAsHF, bits, cast, predictions_in

ARGUMENTS = "megatron_args.txt"  # beside the checkpoint: what rebuilds its model
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SHARD_BYTES = 5 * 10**9
SLACK_BYTES = 64 * 2**20  # indices, headers, configuration


@dataclass(frozen=True)
class Options:
    """What the command line says about how to convert.

    Args:
        dtype: of the output; None keeps each tensor's.
        implementation: local or transformer_engine, the names of norms in the output.
        verify: read the output again and compare.
        dry_run: check and count only.
        shard_bytes: size of HuggingFace shards.
    """

    dtype: torch.dtype | None = None
    implementation: str = "local"
    verify: bool = False
    dry_run: bool = False
    shard_bytes: int = SHARD_BYTES

    def dtype_of(self, name: str, source: torch.dtype) -> torch.dtype:
        """Data type of a tensor in the output; the bias of the router stays as exact as it is."""
        keep = self.dtype is None or not source.is_floating_point or name.endswith("expert_bias")
        return source if keep else self.dtype


def model_of_hf(source: HFReader, implementation: str) -> tuple[Family, Model]:
    """The family and all tensors of a HuggingFace checkpoint, checked name by name and shape by shape.

    Raises:
        ConversionError: a tensor is missing, or not known, or of another shape than the config says.
    """
    family, config = load_config(source.config, str(source.directory / "config.json"))
    names = set(source.names())
    model = spell_out(family, config, implementation, predictions_in(config, names))
    model = replace(model, aliases={copy: of for copy, of in model.aliases.items() if copy in names})
    expected = {name: shape for rule in model.rules for name, shape in zip(rule.sources, rule.shapes, strict=True)}
    expected |= {copy: expected[of] for copy, of in model.aliases.items()}
    if missing := [name for name in expected if name not in names]:
        raise ConversionError(
            f"{source.directory} lacks {few(missing)}, which {family.name} with this config.json needs"
        )
    if unmatched := sorted(names - expected.keys() - derived(names)):
        raise ConversionError(
            f"{source.directory} holds {few(unmatched)}, which nothing in {family.name} with this config.json matches"
        )
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise ConversionError(
                f"{source.directory}: {name} has the shape {source.shape(name)}; config.json leads to {shape}"
            )
    for copy, of in model.aliases.items():
        if not torch.equal(bits(source.read(copy)), bits(source.read(of))):
            raise ConversionError(f"{source.directory}: {copy} and {of} differ; the model has one tensor for both")
    arguments = model.arguments
    for name in derived(names):
        size = arguments["qk_pos_emb_head_dim"] if family.latent else arguments["kv_channels"]
        check_frequencies(name, source.read(name), arguments["rotary_base"], size)
    return family, model


def derived(names: set[str]) -> set[str]:
    """Tensors of older checkpoints that follow from the configuration: frequencies of the rotary positions."""
    return {name for name in names if name.endswith(".rotary_emb.inv_freq")}


def hf_to_megatron(hf: Path, megatron: Path, options: Options) -> Report:
    """Convert a HuggingFace checkpoint into one that `pretrain_xmoe.py --load` reads.

    Raises:
        ConversionError: see `model_of_hf`; or the output exists or cannot be written.
    """
    if not options.dry_run:
        check_new(megatron)
    source = HFReader(hf)
    family, model = model_of_hf(source, options.implementation)
    report = Report(f"{family.name}: HuggingFace -> Megatron", options.dry_run)
    pieces = list(_pieces(source, model, options, report))
    arguments = model.arguments | precision(pieces) | implementation(options)
    if source.scales:
        report.notes.append(f"{len(source.scales)} block-quantised matrices were dequantised to bf16")
    if frequencies := derived(set(source.names())):
        report.notes.append(f"{len(frequencies)} left out: frequencies of the rotary positions follow from the base")
    if model.aliases:
        for name in model.aliases:
            report.count_read(*source.stored(name))
        report.notes.append(f"{len(model.aliases)} second copies, equal to the first: {few(model.aliases)}")
    if options.dry_run:
        return _count_only(report, source, model, pieces)
    size = sum(piece.nbytes for piece in pieces)
    total = sum(source.stored(name)[0] for rule in model.rules for name in rule.sources)
    with new_folder(megatron, size + SLACK_BYTES) as folder, report.progress(total):
        write_checkpoint(folder, pieces, extra_states(rule.slot for rule in model.rules), arguments)
        _write_side_files(folder, source, model, arguments, megatron, options)
        if options.verify:
            verify_megatron(folder, source, model, options, report)
    return report


def _pieces(source: HFReader, model: Model, options: Options, report: Report) -> Iterator[Piece]:
    """What is to be written, one data type for each of Megatron's global tensors."""
    dtypes: dict[str, tuple[torch.dtype, str]] = {}
    for rule in model.rules:
        for name in rule.sources:
            dtype = options.dtype_of(rule.slot.key, source.dtype(name))
            first, first_name = dtypes.setdefault(rule.slot.key, (dtype, name))
            if dtype != first:
                raise ConversionError(
                    f"{first_name} is {first} and {name} is {dtype}; Megatron stores them as one. Fix: choose a --dtype"
                )

        def make(rule=rule, dtype=dtype) -> Tensor:
            parts = [source.read(name) for name in rule.sources]
            for name in rule.sources:
                report.count_read(*source.stored(name))
            cast_parts = [cast(part, dtype, name) for part, name in zip(parts, rule.sources, strict=True)]
            result = rule.join(cast_parts, model.dims)
            report.count_written(result.nbytes, rule.transform.name)
            return result

        slot = rule.slot
        yield Piece(slot.key, slot.offsets, slot.sizes, slot.global_shape, dtype, make)


def _count_only(report: Report, source: HFReader, model: Model, pieces: list[Piece]) -> Report:
    for rule, piece in zip(model.rules, pieces, strict=True):
        for name in rule.sources:
            report.count_read(*source.stored(name))
        report.count_written(piece.nbytes, rule.transform.name)
    return report


def implementation(options: Options) -> dict[str, object]:
    """Megatron's arguments for the layers whose names were written."""
    arguments: dict[str, object] = {"transformer_impl": options.implementation}
    if options.implementation == "transformer_engine":  # its attention looks for an extra state of its own
        arguments["dist_ckpt_strictness"] = "log_unexpected"
    return arguments


def precision(pieces: list[Piece]) -> dict[str, object]:
    """Megatron's argument for the data type that most of the weights have."""
    sizes: dict[torch.dtype, int] = {}
    for piece in pieces:
        sizes[piece.dtype] = sizes.get(piece.dtype, 0) + piece.nbytes
    main = max(sizes, key=sizes.get)
    return {torch.bfloat16: {"bf16": True}, torch.float16: {"fp16": True}}.get(main, {})


def _write_side_files(folder: Path, source: HFReader, model: Model, arguments, target: Path, options: Options) -> None:
    """The arguments, and the source's configuration and tokenizer, from which `megatron_to_hf` makes it again."""
    (folder / HF_FOLDER).mkdir()
    for path in source.side_files():
        shutil.copyfile(path, folder / HF_FOLDER / path.name)
    config = dict(source.config)
    if source.scales:
        del config["quantization_config"]
    if options.dtype is not None:
        config |= {name: CONFIG_NAMES[options.dtype] for name in ("dtype", "torch_dtype") if name in config}
    if config != source.config:
        (folder / HF_FOLDER / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    words = command_line(arguments)
    if (folder / HF_FOLDER / "tokenizer_config.json").is_file() and not any(map(str.isspace, str(target.resolve()))):
        words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(target.resolve() / HF_FOLDER)]
    write_arguments(folder, words)
    record = {"copies": model.aliases}  # whether the source held them, and so whether the way back writes them
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_arguments(folder: Path, words: list[str]) -> None:
    """Note the command line that rebuilds the model."""
    (folder / ARGUMENTS).write_text(" ".join(words) + "\n", encoding="utf-8")


def checkpoint_arguments(megatron: Path) -> tuple[list[str], int]:
    """The command line that rebuilds a checkpoint's model, and its number of tokens.

    Takes `megatron_args.txt` if there is one, else the arguments that the checkpoint was saved with.

    Raises:
        ConversionError: there is no checkpoint, or it has neither.
    """
    reader = TorchDistReader(megatron)
    path, config = megatron / ARGUMENTS, megatron / HF_FOLDER / "config.json"
    noted = getattr(reader.common().get("args"), "xmoe_vocab_size", None)
    vocabulary = read_json(config).get("vocab_size") if config.is_file() else noted
    vocabulary = vocabulary or reader.shape("embedding.word_embeddings.weight")[0]
    if path.is_file():
        return path.read_text(encoding="utf-8").split(), vocabulary
    return command_line(saved_arguments(megatron, reader)), vocabulary


def saved_arguments(megatron: Path, reader: TorchDistReader) -> dict[str, object]:
    """What the arguments that a checkpoint was saved with say about its model.

    Raises:
        ConversionError: it has none, or says of the model what is not served.
    """
    saved = vars(reader.common().get("args", Namespace()))
    if "num_layers" not in saved:
        raise ConversionError(f"{megatron} does not hold the arguments that it was saved with")
    for name, plain in NOT_SERVED.items():
        if saved.get(name) not in (None, plain):
            raise ConversionError(
                f"{megatron} was saved with {name} {saved[name]}; models with {plain} are served here"
            )
    return {name: saved[name] for name in MODEL_ARGUMENTS if name in saved}


def verify_megatron(folder: Path, source: HFReader, model: Model, options: Options, report: Report) -> None:
    """Read a written checkpoint again and compare it with its source, bit by bit.

    Raises:
        ConversionError: names the first tensor that differs, is missing or is too many.
    """
    target = TorchDistReader(folder)
    keys = {rule.slot.key for rule in model.rules}
    if keys != set(target.model_keys()):
        raise ConversionError(f"verification: {few(sorted(keys ^ set(target.model_keys())))} missing or too many")
    for rule in model.rules:
        slot = rule.slot
        stored = target.read(slot.key, slot.offsets, slot.sizes).reshape(slot.shape)
        for name, part in zip(rule.sources, rule.split(stored, model.dims), strict=True):
            wanted = source.read(name)
            if not torch.equal(bits(part), bits(cast(wanted, options.dtype_of(slot.key, wanted.dtype), name))):
                raise ConversionError(f"verification: {slot} does not hold the values of {name}")
    report.notes.append(f"verified: {len(model.rules)} slices were read again and hold the source's bits")


def megatron_to_hf(megatron: Path, hf: Path, options: Options, hf_config: Path | None = None) -> Report:
    """Convert a Megatron checkpoint of any layout into a HuggingFace one.

    Raises:
        ConversionError: a tensor is missing or not known; the output exists or cannot be written.
    """
    if not options.dry_run:
        check_new(hf)
    source = MegatronAsHF(megatron, hf_config)
    report = Report(f"{source.family.name}: Megatron -> HuggingFace", options.dry_run)
    report.notes.append(f"configuration: {source.config_path}")
    outputs = {
        name: Output(options.dtype_of(source.rules[source.copies.get(name, name)][0].slot.key, source.dtype(name)),
                     source.shape(name))
        for name in source.names()
    }  # fmt: skip
    _count_slices(report, source)
    if options.dry_run:
        for name, output in outputs.items():
            report.count_written(output.nbytes, _transform_name(source, name))
        return report
    size = sum(output.nbytes for output in outputs.values())

    def stored_bytes(name: str) -> int:
        return torch.Size(outputs[name].shape).numel() * source.dtype(name).itemsize

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, output in outputs.items():
            yield name, cast(source.read(name), output.dtype, name)
            report.count_written(output.nbytes, _transform_name(source, name))
            report.bar.update(stored_bytes(name))

    total = sum(map(stored_bytes, outputs))
    with new_folder(hf, size + SLACK_BYTES) as folder, report.progress(total):
        for path in side_files(source.config_path.parent):  # first, so that nothing can take the place of a shard
            shutil.copyfile(path, folder / path.name)
        shutil.copyfile(source.config_path, folder / "config.json")
        _adapt_config(folder, options)
        write_shards(folder, outputs, tensors(), options.shard_bytes)
        if options.verify:
            verify_hf(folder, source, outputs, report)
    return report


def _adapt_config(folder: Path, options: Options) -> None:
    """The configuration says what was written: another data type, and no quantisation."""
    path = folder / "config.json"
    before = read_json(path)
    config = {name: value for name, value in before.items() if name != "quantization_config"}
    if options.dtype is not None:
        config |= {name: CONFIG_NAMES[options.dtype] for name in ("dtype", "torch_dtype") if name in config}
    if config != before:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _count_slices(report: Report, source: MegatronAsHF) -> None:
    for rule in source.model.rules:
        report.count_read(torch.Size(rule.slot.shape).numel() * source.reader.dtype(rule.slot.key).itemsize)
        stored = source.reader.shape(rule.slot.key)
        if stored != rule.slot.global_shape:
            report.notes.append(f"{rule.slot.key}: {stored[0] - rule.slot.shape[0]} rows of padding left out")


def _transform_name(source: MegatronAsHF, name: str) -> str:
    return "second copy" if name in source.copies else source.rules[name][0].transform.name


def verify_hf(folder: Path, source: MegatronAsHF, outputs: dict[str, Output], report: Report) -> None:
    """Read written shards again and compare them with their source, bit by bit.

    Raises:
        ConversionError: names the first tensor that differs, is missing or is too many.
    """
    target = HFReader(folder)
    if set(target.names()) != set(outputs):
        raise ConversionError(f"verification: {few(sorted(set(target.names()) ^ set(outputs)))} missing or too many")
    for name, output in outputs.items():
        if not torch.equal(bits(target.read(name)), bits(cast(source.read(name), output.dtype, name))):
            raise ConversionError(f"verification: {name} does not hold the values of the source")
    report.notes.append(f"verified: {len(outputs)} tensors were read again and hold the source's bits")
