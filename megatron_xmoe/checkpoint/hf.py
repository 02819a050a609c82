"""HuggingFace checkpoints: safetensors shards, read and written a tensor at a time."""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_xmoe.checkpoint.names import ConversionError, few
from megatron_xmoe.checkpoint.transforms import Shape, dequantize_blocks

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# what belongs to a checkpoint beside its tensors, and goes along with it
SIDE_FILES = re.compile(r"^(?!.*\.index\.json$).+\.(json|txt|model|jinja|py)$")
SCALE = "_scale_inv"
# pages of a mapped file count as memory of the process; opening it anew gives them back
REOPEN_BYTES = 512 * 2**20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2)


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        ConversionError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}). Fix: check the path") from error
    except ValueError as error:
        raise ConversionError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} is damaged: it holds no object")
    return value


@dataclass(frozen=True)
class Stored:
    """Where a tensor is and what it is."""

    file: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HFReader:
    """The tensors of a HuggingFace checkpoint; holds the names, never the data.

    Block-quantised matrices (DeepSeek-V3) appear as bf16, their scales not at all.
    """

    def __init__(self, directory: Path):
        """Opens a checkpoint.

        Raises:
            ConversionError: files are missing, cut off, or do not hold what the index says.
        """
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self.tensors: dict[str, Stored] = {}
        index = self._index()
        for file in sorted(set(index.values())) if index else [SINGLE]:
            self._list(file, index)
        if index and (lost := index.keys() - self.tensors.keys()):
            raise ConversionError(f"{directory / INDEX} names {few(sorted(lost))}, which the shards do not hold")
        self._open: tuple[str, object, int] | None = None
        self.scales = self._find_scales()

    def _index(self) -> dict[str, str]:
        path = self.directory / INDEX
        if not path.is_file():
            return {}
        weights = read_json(path).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ConversionError(f"{path} is damaged: it has no weight_map")
        for name, file in weights.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ConversionError(f"{path}: {name} is in {file!r}, which is no .safetensors file of this folder")
        return weights

    def _list(self, file: str, index: dict[str, str]) -> None:
        with self._file(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
                item = opened.get_slice(name)
                if item.get_dtype() not in DTYPES:
                    raise ConversionError(f"{self.directory / file}: {name} has the data type {item.get_dtype()}")
                if name in self.tensors or (index and index.get(name) != file):
                    where = index.get(name) or "another shard, or nowhere"
                    raise ConversionError(f"{self.directory / file} holds {name}; the index has it in {where}")
                self.tensors[name] = Stored(file, DTYPES[item.get_dtype()], tuple(item.get_shape()))

    def _file(self, file: str):
        path = self.directory / file
        if not path.is_file():
            raise ConversionError(f"{path} is missing. Fix: download the checkpoint again, as safetensors")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} is damaged or cut off ({error}). Fix: download it again") from error

    def _find_scales(self) -> dict[str, str]:
        """Eight-bit matrix -> its scales."""
        scales = {}
        for name, item in self.tensors.items():
            if item.dtype in EIGHT_BIT:
                scale = name + SCALE
                if scale not in self.tensors:
                    raise ConversionError(f"{self.directory}: {name} is quantised, and its scales {scale} are missing")
                if len(item.shape) != 2:
                    raise ConversionError(f"{self.directory}: {name} is quantised and no matrix: {item.shape}")
                expected = tuple(-(-n // b) for n, b in zip(item.shape, self.block, strict=True))
                if self.tensors[scale].shape != expected:
                    raise ConversionError(
                        f"{scale} has the shape {self.tensors[scale].shape}; {expected} belongs to {item.shape} in "
                        f"blocks of {self.block}"
                    )
                scales[name] = scale
        return scales

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        quantization = self.config.get("quantization_config")
        size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ConversionError("config.json: 8-bit weights need quantization_config.weight_block_size: [128, 128]")
        return size[0], size[1]

    def names(self) -> list[str]:
        """Names of the tensors as they appear, scales left out."""
        scales = set(self.scales.values())
        return [name for name in self.tensors if name not in scales]

    def stored(self, name: str) -> tuple[int, int]:
        """Bytes and number of the stored tensors that a tensor is read from: itself, and its scales."""
        own = [name, self.scales[name]] if name in self.scales else [name]
        return sum(self.tensors[each].nbytes for each in own), len(own)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor as it appears."""
        return torch.bfloat16 if name in self.scales else self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            ConversionError: its file is damaged.
        """
        tensor = self._read(name)
        if name not in self.scales:
            return tensor
        return dequantize_blocks(tensor, self._read(self.scales[name]), self.block, torch.bfloat16)

    def _read(self, name: str) -> Tensor:
        item = self.tensors[name]
        if self._open is None or self._open[0] != item.file or self._open[2] > REOPEN_BYTES:
            self.close()
            self._open = item.file, self._file(item.file), 0
        file, opened, size = self._open
        self._open = file, opened, size + item.nbytes
        try:
            return opened.get_tensor(name).clone()  # the original is the mapped file itself
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ConversionError(f"{self.directory / item.file}: {name} cannot be read ({error})") from error

    def close(self) -> None:
        """Let go of the open shard."""
        self._open = None

    def side_files(self) -> list[Path]:
        """Configuration and tokenizer, which go along with the tensors."""
        return side_files(self.directory)


def side_files(directory: Path) -> list[Path]:
    """Files of a folder that belong to a checkpoint beside its tensors: configuration, tokenizer, never the tensors."""
    return sorted(path for path in directory.iterdir() if SIDE_FILES.match(path.name) and path.is_file())


@dataclass(frozen=True)
class Output:
    """A tensor to be written."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(
    directory: Path, outputs: dict[str, Output], tensors: Iterator[tuple[str, Tensor]], shard_size: int
) -> None:
    """Write safetensors shards and their index, as huggingface_hub divides them.

    Args:
        directory: exists.
        outputs: every tensor, in the order in which `tensors` brings them.
        tensors: name and values.
        shard_size: bytes.
    """
    split = split_state_dict_into_shards_factory(
        outputs,
        get_storage_size=lambda output: output.nbytes,
        get_storage_id=lambda output: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    writers: dict[str, _ShardWriter] = {}
    try:
        for name, tensor in tensors:
            file = split.tensor_to_filename[name]
            if file not in writers:
                content = {each: outputs[each] for each in split.filename_to_tensors[file]}
                writers[file] = _ShardWriter(directory / file, content)
            writers[file].write(name, tensor)
    finally:
        for writer in writers.values():
            writer.close()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _ShardWriter:
    """One safetensors file whose header is written first and whose tensors come later, one by one."""

    def __init__(self, path: Path, content: dict[str, Output]):
        header, offset, self.places = {"__metadata__": {"format": "pt"}}, 0, {}
        for name, output in content.items():
            end = offset + output.nbytes
            header[name] = {"dtype": NAMES[output.dtype], "shape": list(output.shape), "data_offsets": [offset, end]}
            self.places[name], offset = offset, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.file = path.open("wb")
        self.file.write(struct.pack("<Q", len(text)) + text)
        self.start, self.content = self.file.tell(), content

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor where the header says it is."""
        output = self.content[name]
        assert tensor.dtype == output.dtype and tuple(tensor.shape) == output.shape, name
        self.file.seek(self.start + self.places[name])
        if tensor.numel():
            self.file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Finish the file."""
        self.file.close()
