"""Megatron's torch_dist checkpoints, read and written a tensor at a time with torch.distributed.checkpoint."""

import io
import pickle
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_xmoe.checkpoint.names import ConversionError
from megatron_xmoe.checkpoint.transforms import Shape

COMMON_KEY = "common_state/shard_0_1"  # Megatron's name for everything that is not a tensor
TRACKER = "latest_checkpointed_iteration.txt"
FILE_BYTES = 4 * 2**30
_OPTIMIZER = re.compile(r"^(chained_\d+\.)?optimizer\.")


class _MetadataUnpickler(pickle.Unpickler):
    """Reads .metadata files: the classes of torch.distributed.checkpoint's metadata and nothing else."""

    _METADATA = "torch.distributed.checkpoint.metadata"
    _OTHERS = {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        if module == self._METADATA:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        elif (module, name) in self._OTHERS or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise ConversionError(f"it asks for {module}.{name}, which no checkpoint's metadata needs; nothing was run")


def checkpoint_folder(directory: Path) -> Path:
    """The folder with the tensors: of the last iteration, or `directory` itself.

    Raises:
        ConversionError: no torch_dist checkpoint is there.
    """
    tracker = directory / TRACKER
    folder = directory
    if tracker.is_file():
        step = tracker.read_text(errors="replace").strip()
        if step != "release" and not step.isdigit():
            raise ConversionError(f"{tracker} says {step[:40]!r}; it must be an iteration or 'release'")
        folder = directory / (step if step == "release" else f"iter_{int(step):07d}")
    try:
        config = maybe_load_config(str(folder))
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{folder / 'metadata.json'} is damaged ({error})") from error
    if config is None or config.sharded_backend != "torch_dist":
        raise ConversionError(f"{folder} is no torch_dist checkpoint of Megatron (metadata.json). Fix: check the path")
    return folder


class TorchDistReader:
    """The tensors of a torch_dist checkpoint, whatever layout saved it; holds the index, never the data."""

    def __init__(self, directory: Path):
        """Opens a checkpoint.

        Raises:
            ConversionError: there is none, or its index is damaged or not harmless.
        """
        self.folder = checkpoint_folder(directory)
        path = self.folder / ".metadata"
        try:
            with path.open("rb") as file:
                self.metadata: Metadata = _MetadataUnpickler(file).load()
            stored = self.metadata.state_dict_metadata
            self._reader = FileSystemReader(self.folder)
            self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        except OSError as error:
            raise ConversionError(f"{path} cannot be read ({error})") from error
        except Exception as error:  # pickle and damaged attributes fail in many ways
            raise ConversionError(f"{path} is damaged or not harmless: {' '.join(str(error).split())}") from error
        self._check_files()
        self.tensors = {name: item for name, item in stored.items() if isinstance(item, TensorStorageMetadata)}
        self.objects = {name for name, item in stored.items() if isinstance(item, BytesStorageMetadata)}
        self._chunks: dict[str, tuple[int, dict[Shape, list[ChunkStorageMetadata]]]] = {}

    def _check_files(self) -> None:
        """Every file is in the folder and long enough, told from the index before anything is read."""
        needed: dict[str, int] = {}
        for info in self.metadata.storage_data.values():
            end = info.offset + info.length
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
        for name, size in needed.items():
            path = self.folder / name
            if Path(name).name != name or not path.is_file():
                raise ConversionError(f"{path} is missing; the index names it. Fix: copy the checkpoint again")
            if path.stat().st_size < size:
                raise ConversionError(
                    f"{path} is cut off: {path.stat().st_size} bytes, the index says {size}. Fix: copy it again"
                )

    def model_keys(self) -> list[str]:
        """Names of the model's tensors, those of the optimizer left out."""
        return [name for name in self.tensors if not _OPTIMIZER.match(name)]

    def shape(self, key: str) -> Shape:
        """Shape of a global tensor."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Data type of a global tensor."""
        return self.tensors[key].properties.dtype

    def read(self, key: str, offsets: Shape, sizes: Shape) -> Tensor:
        """A box of a global tensor.

        Raises:
            ConversionError: the file is damaged or does not hold all of it.
        """
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        stored = replace(self.tensors[key], chunks=self._candidates(key, offsets, sizes))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        if sum(item.lengths.numel() for item in items) != torch.Size(sizes).numel():
            raise ConversionError(f"{self.folder}: {key} is not complete at {offsets}")
        result = torch.empty(sizes, dtype=self.dtype(key))
        planner = _ReadPlanner(result, b"")
        self._read_items(items, planner, key)
        return result

    def read_object(self, key: str) -> object:
        """Something that is not a tensor, read with torch's weights-only unpickler.

        Raises:
            ConversionError: it is damaged, or needs more than that.
        """
        index = MetadataIndex(key)
        item = ReadItem(LoadItemType.BYTE_IO, index, torch.Size((0,)), index, torch.Size((0,)), torch.Size((0,)))
        planner = _ReadPlanner(torch.empty(0), b"")
        self._read_items([item], planner, key)
        try:
            return torch.load(io.BytesIO(planner.content), weights_only=True)
        except Exception as error:
            raise ConversionError(f"{self.folder}: {key} cannot be read ({_first_line(error)})") from error

    def common(self) -> dict:
        """Arguments, iteration and the like; an empty dict if there are none."""
        if COMMON_KEY in self.objects:
            state = self.read_object(COMMON_KEY)
            return state[0] if isinstance(state, list) and state and isinstance(state[0], dict) else {}
        legacy = self.folder / "common.pt"
        if not legacy.is_file():
            return {}
        try:
            return torch.load(legacy, weights_only=True)
        except Exception as error:
            raise ConversionError(f"{legacy} cannot be read ({_first_line(error)})") from error

    def _read_items(self, items: list[ReadItem], planner: "_ReadPlanner", key: str) -> None:
        try:
            self._reader.read_data(LoadPlan(items), planner)
        except Exception as error:  # torch.load fails in many ways on damaged bytes
            raise ConversionError(f"{self.folder}: {key} cannot be read ({_first_line(error)})") from error

    def _candidates(self, key: str, offsets: Shape, sizes: Shape) -> list[ChunkStorageMetadata]:
        """Saved chunks near a box: by their place along the leading axes, where they hold one layer or expert each."""
        if key not in self._chunks:
            chunks = self.tensors[key].chunks
            leading = 0
            while leading < len(self.shape(key)) and all(chunk.sizes[leading] == 1 for chunk in chunks):
                leading += 1
            by_place = defaultdict(list)
            for chunk in chunks:
                by_place[tuple(chunk.offsets[:leading])].append(chunk)
            self._chunks[key] = leading, by_place
        leading, by_place = self._chunks[key]
        if all(size == 1 for size in sizes[:leading]):
            return by_place.get(tuple(offsets[:leading]), [])
        return self.tensors[key].chunks


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


class _ReadPlanner(LoadPlanner):
    """Hands torch's reader the one tensor or object that is wanted."""

    def __init__(self, target: Tensor, content: bytes):
        self.target, self.content = target, content

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.content = value.getvalue()

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


@dataclass(frozen=True)
class Piece:
    """A slice to be written, made when its turn comes.

    Args: key, offsets, sizes and global_shape say where it goes; make returns it, in any shape of that many elements.
    """

    key: str
    offsets: Shape
    sizes: Shape
    global_shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


class _WritePlanner(SavePlanner):
    """Resolves each item of a plan when torch's writer asks for it, so that one tensor at a time is in memory."""

    def __init__(self):
        self.pieces: dict[tuple[str, Shape | None], Piece | bytes] = {}

    def item(self, key: str, piece: Piece | bytes) -> WriteItem:
        """Registers something to be written."""
        if isinstance(piece, bytes):
            self.pieces[key, None] = piece
            return WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)
        offsets = torch.Size(piece.offsets)
        self.pieces[key, piece.offsets] = piece
        chunk = ChunkStorageMetadata(offsets, torch.Size(piece.sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.global_shape))
        return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        piece = self.pieces[index.fqn, None if index.offset is None else tuple(index.offset)]
        if isinstance(piece, bytes):
            return io.BytesIO(piece)
        tensor = piece.make()
        assert tensor.dtype == piece.dtype, f"{piece.key}: {tensor.dtype} made, {piece.dtype} planned"
        return tensor.reshape(piece.sizes).contiguous()

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan


def write_checkpoint(
    directory: Path, pieces: Iterable[Piece], extra_states: Iterable[str], arguments: dict[str, object]
) -> None:
    """Write a release checkpoint: weights only, from which Megatron starts at iteration 0.

    Args:
        directory: new; gets the tracker file and the folder `release`.
        pieces: slices that cover their tensors, in the order of writing.
        extra_states: names of the empty objects that Megatron's linear layers ask for.
        arguments: Megatron's arguments, by destination, which a later --load compares.
    """
    folder = directory / "release"
    folder.mkdir(parents=True)
    common = {
        "args": Namespace(**arguments, tensor_model_parallel_size=1, pipeline_model_parallel_size=1),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    planner, plans, size = _WritePlanner(), [], 0
    items = [planner.item(COMMON_KEY, _saved([common]))]
    empty = _saved([None])
    items += [planner.item(name, empty) for name in extra_states]
    for piece in pieces:
        if size and size + piece.nbytes > FILE_BYTES:
            plans.append(SavePlan(items))
            items, size = [], 0
        items.append(planner.item(piece.key, piece))
        size += piece.nbytes
    plans.append(SavePlan(items))
    # the files of one writer, as if that many ranks had saved
    writer = FileSystemWriter(folder, thread_count=1, overwrite=False)
    writer.set_up_storage_writer(is_coordinator=True)
    plans = [writer.prepare_local_plan(plan) for plan in plans]
    plans, metadata = planner.create_global_plan(plans)
    results = [writer.write_data(plan, planner).value() for plan in writer.prepare_global_plan(plans)]
    writer.finish(metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    (directory / TRACKER).write_text("release")


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
