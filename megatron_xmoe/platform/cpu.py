"""Lets Megatron's own training loop run on a machine without an accelerator, over gloo.

Megatron asks torch.cuda for devices, streams, events, random states and memory figures all along its training loop.
`install()` gives those names CPU meanings, process-wide, and only where torch finds no accelerator. REPLACEMENTS is the
whole list, with reasons. `torch.cuda.is_available()` stays False, so that torch itself is not misled.
"""

import functools
import os
import sys
import time
import types
from contextlib import nullcontext

import torch

from megatron_xmoe.platform import gloo
from megatron_xmoe.platform.patching import Replacement, apply

CPU = torch.device("cpu")


def needed() -> bool:
    """True where torch finds no CUDA or ROCm device."""
    return not torch.cuda.is_available()


def install() -> list[Replacement]:
    """Put the stand-ins in place. Call before anything of Megatron is imported; a second call changes nothing.

    Returns:
        What is in place now, for the start-up report.

    Raises:
        RuntimeError: there is an accelerator, or a symbol to replace does not exist in the installed version.
    """
    if not needed():
        raise RuntimeError("the CPU stand-ins for torch.cuda must not be installed where there is an accelerator")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's compiled fusions gain nothing here
    with torch.device("meta"):
        torch.empty(0)  # `with torch.device(...)` looks up the factories at its first use, and must find torch's own
    apply(TORCH_REPLACEMENTS)
    apply(MEGATRON_REPLACEMENTS)
    return [*TORCH_REPLACEMENTS, *MEGATRON_REPLACEMENTS]


class Stream:
    """Stands in for torch.cuda.Stream: work on a CPU is done when the call returns."""

    def __init__(self, *args, **kwargs):
        self.cuda_stream = 0

    def wait_stream(self, stream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event=None) -> "Event":
        """An event that has happened."""
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        """All work is done."""
        return True

    def __eq__(self, other) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """Stands in for torch.cuda.Event: keeps the clock of its recording."""

    def __init__(self, *args, **kwargs):
        self.seconds = time.perf_counter()

    def record(self, stream=None) -> None:
        """Take the time."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`."""
        return (end.seconds - self.seconds) * 1e3

    def wait(self, stream=None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True


def _constant(value):
    """A replacement function that takes anything and returns `value`."""

    def make(original):
        def stand_in(*args, **kwargs):
            return value

        return stand_in

    return make


def _instead(function):
    """A replacement that calls `function` with the same arguments."""

    def make(original):
        @functools.wraps(function)
        def stand_in(*args, **kwargs):
            return function(*args, **kwargs)

        return stand_in

    return make


def _subclass(base):
    """A class that behaves as `base`, new for each target so that it can be marked."""
    return lambda original: type(base.__name__, (base,), {})


def _called_by_megatron(depth: int = 2) -> bool:
    return sys._getframe(depth).f_globals.get("__name__", "").startswith("megatron.")


def _device_count(original):
    def device_count() -> int:
        return 1 if _called_by_megatron() else original()

    return device_count


def _is_cuda(device) -> bool:
    return str(device).split(":")[0] == "cuda" if isinstance(device, (str, torch.device)) else False


def _on_cpu(original):
    """A tensor factory whose device="cuda" means the CPU."""

    @functools.wraps(original)
    def factory(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(*args, **kwargs)

    return factory


def _to(original):
    @functools.wraps(original)
    def to(self, *args, **kwargs):
        args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _identity_method(original):
    def cuda(self, *args, **kwargs):
        return self

    return cuda


def _type_name(original):
    """Tensor.type() without arguments: 'torch.cuda.X' for Megatron, whose optimizers assert it, torch.X for others."""

    @functools.wraps(original)
    def type_(self, dtype=None, non_blocking=False, **kwargs):
        if dtype is not None:
            return original(self, dtype, non_blocking, **kwargs)
        name = original(self)
        return name.replace("torch.", "torch.cuda.", 1) if _called_by_megatron() else name

    return type_


def _set_rng_state(new_state, *args, **kwargs):
    torch.set_rng_state(new_state)


def _get_rng_state(*args, **kwargs):
    return torch.get_rng_state()


def _manual_seed(seed):
    torch.manual_seed(seed)


def _device_properties(*args, **kwargs):
    # Megatron asks `major` to decide on CUDA_DEVICE_MAX_CONNECTIONS, which means nothing here
    return types.SimpleNamespace(name="cpu", major=99, minor=0, total_memory=0, multi_processor_count=1)


def _memory_stats(*args, **kwargs):
    return _Zeros()


class _Zeros(dict):
    """A statistics table in which every figure is 0."""

    def __missing__(self, key) -> int:
        return 0


def _stream_context(original):
    return lambda stream=None: nullcontext()


def _current_stream(original):
    return lambda device=None: Stream()


def _split_sizes_as_numpy(original):
    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def _without_cuda(original):
    return functools.partial(original, allow_no_cuda=True)


_FACTORIES = ("tensor", "as_tensor", "empty", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "eye",
              "empty_like", "zeros_like", "ones_like", "full_like", "empty_strided")  # fmt: skip
_MEMORY_FIGURES = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved",
                   "reset_peak_memory_stats", "device_memory_used", "utilization")  # fmt: skip
_NOTHING_TO_DO = ("synchronize", "empty_cache", "set_device", "set_stream", "manual_seed_all")

TORCH_REPLACEMENTS = [
    *(Replacement(f"torch.cuda:{name}", _constant(None), "a CPU has nothing to do here") for name in _NOTHING_TO_DO),
    *(Replacement(f"torch.cuda:{name}", _constant(0), "no device memory to report") for name in _MEMORY_FIGURES),
    *(Replacement(f"torch:{name}", _on_cpu, 'device="cuda" means the CPU') for name in _FACTORIES),
    Replacement("torch.cuda:current_device", _constant(CPU), "tensors are allocated on it"),
    Replacement("torch.cuda:device_count", _device_count, "Megatron builds no process groups when it is 0"),
    Replacement("torch.cuda:get_device_properties", _instead(_device_properties), "asked for the architecture"),
    Replacement("torch.cuda:memory_stats", _instead(_memory_stats), "logged"),
    Replacement("torch.cuda:Stream", _subclass(Stream), "dispatchers and DDP create side streams"),
    Replacement("torch.cuda:Event", _subclass(Event), "timers and dispatchers record events"),
    Replacement("torch.cuda:stream", _stream_context, "work on side streams runs in order"),
    Replacement("torch.cuda:current_stream", _current_stream, "side streams wait for it"),
    Replacement("torch.cuda:default_stream", _current_stream, "side streams wait for it"),
    Replacement("torch.cuda:is_current_stream_capturing", _constant(False), "the routing trace asks"),
    Replacement("torch.cuda:manual_seed", _instead(_manual_seed), "random states are the CPU generator's"),
    Replacement("torch.cuda:get_rng_state", _instead(_get_rng_state), "random states are the CPU generator's"),
    Replacement("torch.cuda:set_rng_state", _instead(_set_rng_state), "random states are the CPU generator's"),
    Replacement("torch.cuda.random:get_rng_state", _instead(_get_rng_state), "random states are the CPU generator's"),
    Replacement("torch.cuda.random:set_rng_state", _instead(_set_rng_state), "random states are the CPU generator's"),
    Replacement("torch.cuda.nvtx:range_push", _constant(0), "profiling ranges"),
    Replacement("torch.cuda.nvtx:range_pop", _constant(0), "profiling ranges"),
    Replacement("torch:Tensor.cuda", _identity_method, "tensors stay where they are"),
    Replacement("torch:Tensor.to", _to, 'device="cuda" means the CPU'),
    Replacement("torch:Tensor.type", _type_name, "the optimizers assert the CUDA type names"),
    Replacement("torch:Tensor.record_stream", _identity_method, "no allocator to inform"),
    Replacement("torch.nn:Module.cuda", _identity_method, "modules stay where they are"),
]

MEGATRON_REPLACEMENTS = [
    Replacement("megatron.training.training:initialize_megatron", _without_cuda, "it asserts that CUDA is available"),
    Replacement(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        _instead(_set_rng_state),
        "it reaches into the CUDA generators",
    ),
    Replacement(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        _split_sizes_as_numpy,
        "gloo takes split sizes as numbers, and the original converts only what is on a GPU",
    ),
    Replacement(
        "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
        gloo.gather_uneven,
        "gloo gathers equal parts only",
    ),
    Replacement(
        "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim",
        gloo.reduce_scatter_uneven,
        "gloo scatters equal parts only",
    ),
]
