#!/usr/bin/env python3
"""Where the time of a training iteration goes, stage by stage, from a trace of Megatron's torch profiler.

Make the trace with any training command and, for iteration 9 of rank 0,

  --profile --use-pytorch-profiler --profile-step-start 9 --profile-step-end 10 \
      --profile-ranks 0 --tensorboard-dir runs/a

which writes runs/torch_profile/rank-0.json.gz, and read it with

  python tools/profile_step.py runs/torch_profile/rank-0.json.gz

Every moment between the first and the last kernel belongs to one stage: to the kernel that runs (to the one that began
first, where several do), or where none runs to the stage of the kernel that comes next, as waiting: for the host, or
for another rank. Stages of MoE layers are X-MoE's ranges; the rest goes by the names of torch's operations. Backward
kernels count where their forward operation does. The profiler slows the host down, so waiting is overstated: compare
with the iterations that were not profiled.
"""

import argparse
import gzip
import json
import re
import sys
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from command_line import OneLineErrorParser, UserError, positive_number, run_tool  # noqa: E402

PROG = "tools/profile_step.py"
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
BACKWARD = "autograd::engine::evaluate_function: "
RANGE = "xmoe."
LOSS = "loss"
LINEAR, OUTPUT_LAYER = "linear layers (attention, dense)", "output layer"
REST, AFTER = "residuals, rotary embedding, other", "gradient norm, clipping, bookkeeping"
ACCUMULATION = "gradients' accumulation"
RULES = (
    ("Optimizer.step#", "optimizer's step"),
    ("CrossEntropy", LOSS),
    ("AccumulateGrad", ACCUMULATION),
    ("c10d::|nccl:", "exchange of gradients and figures"),
    ("scaled_dot_product", "attention"),
    ("embedding", "embedding"),
    ("rms_norm|layer_norm|RmsNorm|LayerNorm", "norms"),
    ("LinearWith|aten::linear", LINEAR),
)
"""Expression, and the stage of an operation whose name, or that of one around it, matches; the first one counts."""


@dataclass
class Spent:
    """Milliseconds of a stage."""

    forward: float = 0.0
    backward: float = 0.0
    waiting: float = 0.0
    kernels: int = 0


@dataclass
class Step:
    """What a trace says."""

    stages: dict[str, Spent] = field(default_factory=lambda: defaultdict(Spent))
    kernels: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """Milliseconds of each run by stage and kernel."""

    span: float = 0.0
    """From the first kernel to the end of the last, ms."""


def events_of(path: Path) -> list[dict]:
    """Events of a trace that have a beginning and an end."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            events = json.load(file)["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no trace of torch's profiler: {error}. Fix: --help says how to make one") from error
    return [event for event in events if event.get("ph") == "X"]


def stacks(events: Iterable[dict]) -> dict[int, list[dict]]:
    """Operations around each launch, outermost first, by its correlation id."""
    of_thread, found = defaultdict(list), {}
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            of_thread[event["tid"]].append(event)
    for thread in of_thread.values():
        around: list[dict] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
                around.pop()
            if event["cat"].startswith("cuda_"):
                found[event["args"].get("correlation")] = list(around)
            else:
                event["around"] = list(around)
                around.append(event)
    return found


class Stages:
    """Says to which stage an operation belongs."""

    def __init__(self, events: list[dict]):
        """Args: all events of a trace, after `stacks`."""
        operations = [e for e in events if e.get("cat") == "cpu_op"]
        backward = [e for e in operations if e["name"].startswith(BACKWARD)]
        self.end_of_backward = max((e["ts"] + e["dur"] for e in backward), default=float("inf"))
        self._gates = sorted(e["ts"] for e in events if e["name"] == RANGE + "gate" and "around" in e)
        self._losses = sorted(e["ts"] for e in operations if re.search("CrossEntropy", e["name"]))
        self._of_sequence = {}
        for event in sorted(operations, key=lambda e: e["ts"]):
            number = event["args"].get("Sequence number", -1)
            # of the operations with a number the last one made the node that the backward pass evaluates
            if number >= 0 and not event["args"].get("Fwd thread id") and not event["name"].startswith(BACKWARD):
                self._of_sequence[number] = [*event["around"], event]

    def of(self, stack: list[dict]) -> tuple[str, bool]:
        """The stage of operations around a launch, and whether it is of the backward pass."""
        evaluated = next((e for e in stack if e["name"].startswith(BACKWARD)), None)
        if evaluated is None:
            return self._forward(stack), False
        inside = stack[stack.index(evaluated) :]
        ranges = any(e["name"].startswith(RANGE) for e in inside)  # computed again
        forward = self._of_sequence.get(evaluated["args"].get("Sequence number", -1))
        known = self._named(inside)
        if ranges or forward is None or known == ACCUMULATION:
            return known or REST, True
        return self._forward(forward), True

    def _named(self, stack: list[dict]) -> str | None:
        for event in reversed(stack):
            if event["name"].startswith(RANGE):
                return event["name"].removeprefix(RANGE)
        names = [event["name"] for event in stack]
        return next((stage for pattern, stage in RULES if any(re.search(pattern, name) for name in names)), None)

    def _forward(self, stack: list[dict]) -> str:
        begin = stack[-1]["ts"] if stack else 0.0
        stage = self._named(stack)
        if stage == LINEAR and self._loss_is_next(begin):
            return OUTPUT_LAYER
        return stage or (AFTER if begin > self.end_of_backward else REST)

    def _loss_is_next(self, time: float) -> bool:
        """Whether the loss follows before another MoE layer does."""
        gate, loss = bisect(self._gates, time), bisect(self._losses, time)
        if loss == len(self._losses):
            return False
        return gate == len(self._gates) or self._losses[loss] < self._gates[gate]


def analyse(events: list[dict]) -> Step:
    """Divide the time of a trace among the stages."""
    launches = stacks(events)
    stages, step = Stages(events), Step()
    kernels = sorted((e for e in events if e.get("cat") in DEVICE), key=lambda e: e["ts"])
    if not kernels:
        raise UserError("no kernels in the trace. Fix: profile an iteration on a GPU, one that the run gets to")
    reached = begin = kernels[0]["ts"]
    for kernel in kernels:
        stage, backward = stages.of(launches.get(kernel["args"].get("correlation"), []))
        spent, end = step.stages[stage], kernel["ts"] + kernel["dur"]
        spent.waiting += max(0.0, kernel["ts"] - reached) / 1e3
        alone = max(0.0, end - max(kernel["ts"], reached)) / 1e3
        if backward:
            spent.backward += alone
        else:
            spent.forward += alone
        spent.kernels += 1
        step.kernels[stage, kernel["name"]].append(kernel["dur"] / 1e3)
        reached = max(reached, end)
    step.span = (reached - begin) / 1e3
    return step


def table(step: Step) -> str:
    """The stages by time, and their sum."""
    lines = [f"{'stage':<40}{'forward ms':>11}{'backward ms':>12}{'waiting ms':>11}{'kernels':>9}{'share':>8}"]

    def line(name: str, spent: Spent) -> str:
        total = spent.forward + spent.backward + spent.waiting
        return (f"{name:<40}{spent.forward:11.2f}{spent.backward:12.2f}{spent.waiting:11.2f}{spent.kernels:9}"
                f"{total / (step.span or 1):8.1%}")  # fmt: skip

    total = Spent()
    by_time = sorted(step.stages.items(), key=lambda item: -(item[1].forward + item[1].backward + item[1].waiting))
    for name, spent in by_time:
        lines.append(line(name, spent))
        for attribute, value in vars(spent).items():
            setattr(total, attribute, getattr(total, attribute) + value)
    return "\n".join([*lines, line("all", total)])


def longest(step: Step, number: int) -> str:
    """The kernels that take most time."""
    by_time = sorted(step.kernels.items(), key=lambda item: -sum(item[1]))[:number]
    lines = [f"{'ms':>9}{'runs':>6}  {'stage':<40}kernel"]
    return "\n".join(
        [*lines, *(f"{sum(runs):9.2f}{len(runs):6}  {stage:<40}{name[:70]}" for (stage, name), runs in by_time)]
    )


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; returns the exit code."""
    parser = OneLineErrorParser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="a file rank-N.json.gz")
    parser.add_argument("--kernels", type=positive_number(int), metavar="N", default=0,
                        help="also list the N kernels that take most time (default: 0)")  # fmt: skip
    args = parser.parse_args(argv)
    step = analyse(events_of(args.trace))
    print(table(step))
    if args.kernels:
        print("\n" + longest(step, args.kernels))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
