"""What a training run wrote into its TensorBoard events, over all starts of the run."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from command_line import UserError

SCALARS_TAG, LOAD_TAG, SEQUENCE_TAG = "xmoe/", "xmoe-expert-load", "seq_length/text_summary"
BREAKDOWN_TAG = "xmoe-breakdown/{}-ms"
STAGES = ("gate", "permute", "dispatch", "experts", "combine", "unpermute")

Series = dict[int, float]
"""Values by iteration."""


@dataclass
class Run:
    """Curves by tag over iterations, the iterations at which the run went on, and the last load of the experts."""

    loss_tag: str = "lm loss"
    series: dict[str, Series] = field(default_factory=dict)
    seconds: list[Series] = field(default_factory=list)
    """Of each start: when an iteration was logged."""

    resumed: list[int] = field(default_factory=list)
    load: tuple[int, list[list[float]]] | None = None
    """Iteration, and of each layer each expert's routes over the even share; zeros in layers without experts."""

    sequence_length: int | None = None

    def __getitem__(self, tag: str) -> Series:
        return self.series.get(tag, {})

    def add_session(self, session: "Session") -> None:
        """Append what one start wrote; iterations that it computed again replace the older ones."""
        losses = session.series.get(self.loss_tag)
        if not losses:
            return
        first = min(losses)
        for series in self.series.values():
            for iteration in [i for i in series if i >= first]:
                del series[iteration]
        for tag, new in session.series.items():
            self.series.setdefault(tag, {}).update(new)
        self.resumed = [i for i in self.resumed if i < first - 1]
        if first > 1:
            self.resumed.append(first - 1)
        self.seconds.append(session.seconds)
        self.load = session.load or self.load
        self.sequence_length = session.sequence_length or self.sequence_length

    @property
    def breakdown(self) -> dict[str, float]:
        """Median milliseconds of each stage, or nothing; the first report, which warms up, is left out."""
        curves = {stage: self[BREAKDOWN_TAG.format(stage)] for stage in STAGES}
        if not all(curves.values()):
            return {}
        return {stage: statistics.median([curve[i] for i in sorted(curve)][1:] or curve.values())
                for stage, curve in curves.items()}  # fmt: skip

    @property
    def throughput(self) -> Series:
        """Tokens a second, or samples where the events do not say how long these are, from the times of the losses."""
        rates, batch = {}, self["batch-size"]
        for seconds in self.seconds:
            iterations = sorted(seconds)
            for before, now in zip(iterations, iterations[1:], strict=False):
                elapsed = seconds[now] - seconds[before]
                if elapsed > 0 and now in batch:
                    samples = batch[now] * (now - before)
                    rates[now] = samples * (self.sequence_length or 1) / elapsed
        return rates


@dataclass
class Session:
    """What one start of the training wrote."""

    begun: float
    series: dict[str, Series]
    seconds: Series
    load: tuple[int, list[list[float]]] | None
    sequence_length: int | None


def read_run(directory: Path, loss_tag: str) -> Run:
    """Read all event files of a directory; each start of the training wrote one."""
    sessions = [_read_session(path, loss_tag) for path in directory.glob("events.out.tfevents.*")]
    run = Run(loss_tag)
    for session in sorted(sessions, key=lambda session: session.begun):
        run.add_session(session)
    if not run[loss_tag]:
        raise UserError(
            f"--tensorboard-dir {directory} has no events with '{loss_tag}': give the folder of a training run"
        )
    return run


def _read_session(path: Path, loss_tag: str) -> Session:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    # all points of the curves, the last one of everything else
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 1}, purge_orphaned_data=False)
    events.Reload()
    tags = events.Tags()
    scalars = {tag: events.Scalars(tag) for tag in tags["scalars"] if not tag.endswith(" vs samples")}
    last = {tag: events.Tensors(tag)[-1] for tag in (LOAD_TAG, SEQUENCE_TAG) if tag in tags["tensors"]}
    load, length = last.get(LOAD_TAG), last.get(SEQUENCE_TAG)
    return Session(
        begun=events.FirstEventTimestamp() if scalars or last else 0.0,
        series={tag: first_values(curve) for tag, curve in scalars.items()},
        seconds={event.step: event.wall_time for event in scalars.get(loss_tag, ())},
        load=load and (load.step, make_ndarray(load.tensor_proto).tolist()),
        sequence_length=length and int(make_ndarray(length.tensor_proto).item()),
    )


def first_values(events) -> Series:
    """Step -> value; of several the first: Megatron ends with the test set's loss, called a validation loss as well."""
    found: Series = {}
    for event in events:
        found.setdefault(event.step, event.value)
    return found
