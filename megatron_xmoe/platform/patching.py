"""Replacing a named symbol of another package: idempotent, labelled, and loud when the symbol has moved."""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_MARK = "_megatron_xmoe_original"


@dataclass(frozen=True)
class Replacement:
    """One symbol that is replaced, and why."""

    target: str
    """'package.module:Name' or 'package.module:Class.method'."""

    make: Callable[[Any], Any]
    """Takes the original and returns what stands in for it; the original itself where nothing has to."""

    why: str


def apply(replacements: Sequence[Replacement]) -> int:
    """Put every replacement in place that is not there yet; returns how many were new.

    Raises:
        RuntimeError: a symbol does not exist; names it and the installed version.
    """
    return sum(_apply_one(replacement) for replacement in replacements)


def is_in_place(replacement: Replacement) -> bool:
    """Whether something stands in for the symbol.

    Raises:
        RuntimeError: the symbol does not exist.
    """
    owner, name = _place(replacement)
    return hasattr(getattr(owner, name), _MARK)


def _place(replacement: Replacement) -> tuple[Any, str]:
    """What has the symbol as an attribute, and the attribute's name."""
    module_name, _, path = replacement.target.partition(":")
    *parents, name = path.split(".")
    try:
        owner = importlib.import_module(module_name)
        for parent in parents:
            owner = getattr(owner, parent)
        getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(_moved(replacement, module_name, error)) from error
    return owner, name


def _apply_one(replacement: Replacement) -> bool:
    owner, name = _place(replacement)
    original = getattr(owner, name)
    if getattr(original, _MARK, None) is not None:
        return False
    stand_in = replacement.make(original)
    if stand_in is original:
        return False
    setattr(stand_in, _MARK, original)
    setattr(owner, name, stand_in)
    return True


def _moved(replacement: Replacement, module_name: str, error: Exception) -> str:
    package = module_name.split(".")[0]
    if package == "megatron":  # its own __version__ carries the commit of whatever repository it lies in
        package, version = "megatron-core", importlib.metadata.version("megatron-core")
    else:
        version = getattr(sys.modules.get(package), "__version__", "of unknown version")
    return (
        f"{replacement.target} does not exist in {package} {version} ({error}); it is replaced because "
        f"{replacement.why}. Install the versions of constraints.txt, or report this"
    )
