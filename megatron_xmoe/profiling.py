"""Where the time of a layer goes: named ranges for profilers, and a clock for the stages of the forward pass."""

import functools
from collections import deque
from collections.abc import Callable, Collection

import torch
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, get_moe_metrics_tracker
from megatron.core.utils import nvtx_range_pop, nvtx_range_push

STAGES = ("gate", "permute", "dispatch", "experts", "combine", "unpermute")
"""Stages of a layer's forward pass, in order: dispatch and combine are the exchanges, permute and unpermute the
reordering before and after them (paper, table of section 5: gate, dispatch buffer, all-to-all, experts, all-to-all,
combine)."""

ALL_STAGES, NO_STAGES = frozenset(STAGES), frozenset()

EXCHANGES = ("dispatch", "combine")

MOST_PENDING = 1024
"""Stages that the clock has timed and not read."""

_RANGES = {stage: f"xmoe.{stage}" for stage in STAGES}


class StageClock:
    """Times stages by events that the device reaches; on a CPU, where work is done at once, by its clock.

    Events are read in `read`, or once MOST_PENDING stages came after them, so the host runs no further than that ahead
    of the device. Of nested stages, the outer one gets what the inner ones leave.
    """

    def __init__(self, stages: Collection[str]):
        """Args: the stages that are timed."""
        self.stages = frozenset(stages)
        self._spent: dict[tuple[int, str], float] = {}
        self._open: list[tuple[tuple[int, str], torch.cuda.Event]] = []
        self._pending: deque = deque()
        self._unused: list[torch.cuda.Event] = []

    def begin(self, layer_number: int, stage: str) -> None:
        """A stage begins on the current stream."""
        if stage in self.stages:
            self._open.append(((layer_number, stage), self._now()))

    def end(self, stage: str) -> None:
        """The stage that began last ends on the current stream."""
        if stage not in self.stages:
            return
        key, begin = self._open.pop()
        outer = self._open[-1][0] if self._open else None
        self._pending.append((key, outer, begin, self._now()))
        if len(self._pending) > MOST_PENDING:
            self._take()

    def read(self) -> dict[tuple[int, str], float]:
        """Milliseconds by layer and stage since the last call. Waits for the last of the stages."""
        while self._pending:
            self._take()
        spent, self._spent = self._spent, {}
        return spent

    def _now(self) -> torch.cuda.Event:
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _take(self) -> None:
        key, outer, begin, end = self._pending.popleft()
        end.synchronize()
        milliseconds = begin.elapsed_time(end)
        self._spent[key] = self._spent.get(key, 0.0) + milliseconds
        if outer is not None:
            self._spent[outer] = self._spent.get(outer, 0.0) - milliseconds
        self._unused += (begin, end)


class MemoryProbe:
    """How far the allocated memory rises during a layer's forward pass above what it was when the gate began.

    It is looked at where stages end, in the first pass of each layer while the probe is armed, because asking the
    allocator takes the host some time. The allocator's own peak, which Megatron reports, is left alone.
    """

    def __init__(self) -> None:
        self.armed = False
        self.peaks: dict[int, int] = {}
        """Bytes, by layer."""
        self._before: dict[int, int] = {}
        self._watched: int | None = None

    def arm(self, armed: bool = True) -> None:
        """From now on look at the next pass of each layer, or at none."""
        self.armed, self._watched = armed, None
        self._before.clear()

    def begin(self, layer_number: int, stage: str) -> None:
        """A stage begins."""
        if stage == STAGES[0] and self.armed:
            self._watched = None
            if layer_number not in self._before:
                self._watched, self._before[layer_number] = layer_number, allocated_bytes()
                self.peaks[layer_number] = 0

    def end(self, layer_number: int) -> None:
        """A stage ends."""
        if layer_number == self._watched:
            rise = allocated_bytes() - self._before[layer_number]
            self.peaks[layer_number] = max(self.peaks[layer_number], rise)


def allocated_bytes() -> int:
    """Bytes of tensors on the device, as the allocator counts them on the host; 0 without a device."""
    statistics = torch.cuda.memory_stats_as_nested_dict()
    return statistics["allocated_bytes"]["all"]["current"] if statistics else 0


class profile_range:
    """Marks a stage of a layer for profilers, and measures it where metrics want that.

    Profilers see `xmoe.<stage>`: NVTX or roctx with Megatron's `--profile --nvtx-ranges`, and torch's profiler while it
    runs. It costs next to nothing otherwise.
    """

    __slots__ = ("stage", "layer_number", "_tracker", "_shown")

    def __init__(self, stage: str, layer_number: int | None = None):
        """Args: one of STAGES; the layer's number in the model, None outside of one."""
        self.stage, self.layer_number = stage, layer_number
        self._tracker = self._shown = None

    def __enter__(self) -> None:
        name = _RANGES[self.stage]
        nvtx_range_push(name)
        if torch.autograd._profiler_enabled():
            self._shown = torch.profiler.record_function(name)
            self._shown.__enter__()
        if self.layer_number is not None:
            tracker = recording_tracker()
            if tracker is not None and self.stage in tracker.watched_stages:
                self._tracker = tracker
                tracker.stage_begins(self.layer_number, self.stage)

    def __exit__(self, *error) -> None:
        if self._tracker is not None:
            self._tracker.stage_ends(self.layer_number, self.stage)
        if self._shown is not None:
            self._shown.__exit__(*error)
        nvtx_range_pop(_RANGES[self.stage])


def recording_tracker() -> MoEMetricsTracker | None:
    """Megatron's tracker of metrics, if it is one of X-MoE's and the pass under way counts.

    A pass without gradients does not: it is evaluation, or the first of the two forward passes that activation
    recomputation makes.
    """
    tracker = get_moe_metrics_tracker()
    return tracker if hasattr(tracker, "stage_begins") and torch.is_grad_enabled() else None


def profiled(**stages: str) -> Callable[[type], type]:
    """Class decorator: puts a `profile_range` around methods, own or inherited ones, given as method=stage.

    The layer is that of the object's `layer_number`, or of its `token_dispatcher`, which knows the number in the model.
    """

    def decorate(cls: type) -> type:
        for method, stage in stages.items():
            setattr(cls, method, _ranged(getattr(cls, method), stage))
        return cls

    return decorate


def _ranged(method: Callable, stage: str) -> Callable:
    @functools.wraps(method)
    def ranged(self, *args, **options):
        with profile_range(stage, getattr(self, "token_dispatcher", self).layer_number):
            return method(self, *args, **options)

    return ranged
