"""Checks of the data, made on every rank before any of them can wait for another; see `checks`."""

import argparse
import json
import struct
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path, get_idx_path
from megatron.core.datasets.utils import Split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_xmoe.training.errors import UsageError, one_line

INDEX_HEADER = struct.Struct("<9sQBQQ")  # Megatron's .idx: magic, version, dtype, sequences, documents


def check_data(args: argparse.Namespace, vocab_size: int | None) -> None:
    """Every data set exists, is whole, and was made with this vocabulary.

    Args:
        args: validated arguments.
        vocab_size: of the tokenizer, without padding; None if it does not say.

    Raises:
        UsageError: names the first file that is wrong.
    """
    if args.mock_data or args.skip_train:
        return
    try:
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    except OSError as error:
        raise UsageError(f"the list of data sets cannot be read: {one_line(error)}. Fix: check the path") from error
    parts = _parts(args.split, *blend) if blend else {}
    blends = [blend] if blend else list(blend_per_split or [])
    prefixes = [prefix for one in blends if one for prefix in one[0]]
    if not prefixes:
        raise UsageError("no training data. Fix: give --data-path PREFIX (without .bin), or --mock-data")
    for prefix in prefixes:
        if "://" not in prefix:  # object stores are read by Megatron's own readers
            sequences = _check_prefix(prefix, vocab_size)
            _check_parts(prefix, sequences, parts, args.split)


def _parts(split: str | None, prefixes: list[str], weights: list[float] | None) -> dict[str, tuple[float, float]]:
    """Where the parts of --split begin and end, as shares, that Megatron goes through until it has enough samples.

    It leaves parts of share 0 out, and goes through several data sets without weights once.
    """
    if split is None:
        raise UsageError("--split is missing, which --data-args-path needs. Fix: for example --split 969,30,1")
    if weights is None and len(prefixes) > 1:
        return {}
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return {part.name: ends for part, ends in zip(Split, matrix, strict=True) if ends is not None}


def _check_parts(prefix: str, sequences: int, parts: dict[str, tuple[float, float]], split: str) -> None:
    """Megatron would go through an empty part for ever."""
    for name, (begin, end) in parts.items():
        if round(begin * sequences) == round(end * sequences):
            raise UsageError(
                f"--split {split} leaves no document for the {name} part of {prefix}, which has {sequences}. Fix: more "
                "documents (tools/preprocess_data.py --txt-document paragraph makes more of a text), larger parts "
                "(--split 80,10,10), or 0 for parts that are not wanted (--split 100,0,0 --eval-iters 0)"
            )


def _check_prefix(prefix: str, vocab_size: int | None) -> int:
    """Returns the number of its sequences, between which --split may cut."""
    for path in map(Path, (get_idx_path(prefix), get_bin_path(prefix))):
        if not path.is_file():
            raise UsageError(
                f"data file {path} does not exist. Fix: --data-path takes the prefix of a .bin/.idx pair made by "
                "tools/preprocess_data.py, without the ending"
            )
    fix = "Fix: make the data set again with tools/preprocess_data.py"
    _check_index_size(Path(get_idx_path(prefix)), fix)
    try:
        index = IndexedDataset(prefix, multimodal=False, mmap=True).index
        pointers, lengths = index.sequence_pointers, index.sequence_lengths
        expected = int(pointers[-1]) + int(lengths[-1]) * index.dtype_size if len(lengths) else 0
    except Exception as error:  # a damaged index fails in numpy, struct or an assertion
        raise UsageError(f"data file {get_idx_path(prefix)} is damaged ({one_line(error)}). {fix}") from error
    size = Path(get_bin_path(prefix)).stat().st_size
    if size < expected:
        raise UsageError(f"data file {get_bin_path(prefix)} has {size} bytes; its index says {expected}. {fix}")
    if expected == 0:
        raise UsageError(f"data set {prefix} holds no tokens. {fix}")
    _check_sidecar(Path(f"{prefix}.json"), vocab_size)
    return len(lengths)


def _check_index_size(path: Path, fix: str) -> None:
    """A truncated index, told from its header before Megatron's reader trips over it."""
    with path.open("rb") as file:
        header = file.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size:
        raise UsageError(f"data file {path} has {len(header)} bytes, less than its header. {fix}")
    *_, sequences, documents = INDEX_HEADER.unpack(header)
    expected = INDEX_HEADER.size + 12 * sequences + 8 * documents  # lengths int32, pointers and documents int64
    if path.stat().st_size < expected:
        raise UsageError(f"data file {path} has {path.stat().st_size} bytes; its header says {expected}. {fix}")


def _check_sidecar(path: Path, vocab_size: int | None) -> None:
    """tools/preprocess_data.py notes the vocabulary next to the data; data from elsewhere has no such file."""
    if vocab_size is None or not path.is_file():
        return
    try:
        made_with = json.loads(path.read_text()).get("vocab_size")
    except (ValueError, AttributeError):
        return  # some other program's file
    if isinstance(made_with, int) and made_with != vocab_size:
        raise UsageError(
            f"{path.with_suffix('')} was made with a vocabulary of {made_with}, the tokenizer has {vocab_size}. "
            "Fix: use the tokenizer of the data, or make the data again"
        )
