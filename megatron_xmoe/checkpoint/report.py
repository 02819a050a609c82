"""What a conversion counts and shows, and how its output appears whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from megatron_xmoe.checkpoint.names import ConversionError


@dataclass
class Report:
    """Counts of one conversion."""

    title: str
    dry_run: bool = False
    read: int = 0
    read_bytes: int = 0
    written: int = 0
    written_bytes: int = 0
    transformed: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bar: tqdm | None = None

    def count_read(self, nbytes: int, tensors: int = 1) -> None:
        """Counts tensors of the source."""
        self.read += tensors
        self.read_bytes += nbytes
        if self.bar is not None:
            self.bar.update(nbytes)

    def count_written(self, nbytes: int, transform: str, tensors: int = 1) -> None:
        """Counts tensors of the output, and what was done to them."""
        self.written += tensors
        self.written_bytes += nbytes
        self.transformed[transform] = self.transformed.get(transform, 0) + tensors

    def progress(self, total: int) -> tqdm:
        """A progress bar in bytes of the source; shown on a terminal only."""
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc=self.title, disable=None, leave=False)
        return self.bar

    def table(self) -> str:
        """The final table."""
        verb = "to be written" if self.dry_run else "written"
        lines = [
            f"{self.title}{' (dry run)' if self.dry_run else ''}",
            f"  {'':<34}{'tensors':>10}{'bytes':>18}",
            f"  {'read':<34}{self.read:>10}{self.read_bytes:>18}",
            f"  {verb:<34}{self.written:>10}{self.written_bytes:>18}",
            *(f"    {name:<32}{count:>10}" for name, count in sorted(self.transformed.items())),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


@contextlib.contextmanager
def new_folder(path: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name if the block succeeds and vanishes if not.

    Raises:
        ConversionError: `path` exists, its parent does not, or the disk is too small for `needed_bytes`.
    """
    check_new(path)
    parent = path.resolve().parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise ConversionError(
            f"{parent} has {free / 2**30:.1f} GiB free, the output needs {needed_bytes / 2**30:.1f}. Fix: free some "
            "space or write elsewhere"
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        os.rename(temporary, path)  # an empty folder of that name may be replaced, nothing else
    except OSError as error:
        raise ConversionError(f"{path} could not be written: {error}. Nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(path: Path) -> None:
    """Raises ConversionError where output would replace something, or has no folder to go to."""
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ConversionError(f"{path} exists. Fix: choose another name, or remove it first")
    if not path.resolve().parent.is_dir():
        raise ConversionError(f"{path.resolve().parent} is not a folder: the output goes there. Fix: make it first")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
