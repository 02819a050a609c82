#!/usr/bin/env python3
"""What --xmoe-metrics costs in your own training: a run in which X-MoE's figures are recorded in every other turn.

A turn is as long as Megatron's --log-interval and includes the report at its end; evaluation and saving do not count.
Turns within one run see the same machine, which two runs do not. Besides its own it takes pretrain_xmoe.py's arguments.

  torchrun --nproc-per-node 2 tools/measure_metrics.py --moe-backend xmoe --train-iters 400 --log-interval 10 ...
"""

import argparse
import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAM_START = time.time()
TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]

from command_line import OneLineErrorParser, positive_number  # noqa: E402

FEWEST = 3
"""Turns of each kind that quartiles are taken of."""


class Turns:
    """Two trackers that take turns, and the time of an iteration in each turn.

    The time of an iteration is that from the beginning of its step to the end of its line in the log, if it gets one;
    what Megatron does besides (evaluation, saving) does not count.
    """

    def __init__(self, trackers: tuple, use: Callable, log_interval: int, clock: Callable[[], float]) -> None:
        """Args: trackers, first the one that records; use, makes one of them Megatron's; clock, in seconds."""
        self.trackers, self.use, self.log_interval, self.clock = trackers, use, log_interval, clock
        self.seconds: list[float] = []  # of an iteration, in each turn; the first one records
        self._times: list[float] = []  # of the iterations of this turn
        self._began = 0.0
        use(trackers[0])

    def iteration_begins(self) -> None:
        """To be called before each step."""
        self._began = self.clock()

    def iteration_ends(self, iteration: int) -> None:
        """To be called after Megatron's log of each iteration: when that writes a line, the device is done."""
        self._times.append(self.clock() - self._began)
        if iteration % self.log_interval == 0:
            self.seconds.append(statistics.fmean(self._times))
            self._times.clear()
            self.use(self.trackers[len(self.seconds) % 2])

    def accompany(self, training) -> None:
        """Have Megatron's training module call the two."""
        step, log = training.train_step, training.training_log
        of_log = inspect.signature(log)

        def timed_step(*arguments, **named):
            self.iteration_begins()
            return step(*arguments, **named)

        def timed_log(*arguments, **named):
            result = log(*arguments, **named)
            self.iteration_ends(of_log.bind(*arguments, **named).arguments["iteration"])
            return result

        training.train_step, training.training_log = timed_step, timed_log


def turns_needed(warm_up: int) -> int:
    """Turns of both kinds."""
    return 2 * (warm_up + FEWEST)


def summary(seconds: list[float], warm_up: int) -> str:
    """Medians and quartiles of turns that record and that do not, and by how much each that records is longer than the
    mean of the two around it, which a machine that gets slower or faster does not change.

    Args: seconds of an iteration in each turn, those that record first; the first turns of each kind, which do not
        count.

    Raises:
        ValueError: too few turns.
    """
    seconds = seconds[2 * warm_up - 1 :]  # the first one is compared with the one after it, and counts no further
    without, recording = seconds[::2], seconds[1:-1:2]
    if len(recording) < FEWEST:
        raise ValueError(f"{len(recording)} turns of each kind are too few; {FEWEST} are needed")
    lines = [f"an iteration in {len(recording)} turns of each kind: median (quartiles)"]
    for name, values in (("with X-MoE's figures", recording), ("without", without[1:])):
        low, middle, high = (1e3 * value for value in statistics.quantiles(values, n=4))
        lines.append(f"{name:<22}{middle:>10.2f} ms ({low:.2f} to {high:.2f})")
    around = zip(recording, without, without[1:], strict=False)
    low, middle, high = statistics.quantiles([2 * of / (before + after) - 1 for of, before, after in around], n=4)
    lines.append(f"{'the figures cost':<22}{middle:>10.2%}    ({low:.2%} to {high:.2%})")
    return "\n".join(lines)


def parse() -> tuple[OneLineErrorParser, int]:
    """The parser, and the turns of each kind that do not count; leaves the other options for pretrain_xmoe.py."""
    parser = OneLineErrorParser(
        prog="tools/measure_metrics.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--warm-up-turns", type=positive_number(int), default=1, metavar="N",
                        help="turns of each kind that do not count, at the start (default: 1)")  # fmt: skip
    args, of_training = parser.parse_known_args()
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--moe-backend")
    peek.add_argument("--xmoe-metrics")
    known, _ = peek.parse_known_args(of_training)
    if known.moe_backend != "xmoe" or known.xmoe_metrics == "off":
        parser.error("nothing is recorded in such a run. Fix: --moe-backend xmoe, and not --xmoe-metrics off")
    sys.argv[1:] = of_training
    return parser, args.warm_up_turns


def main() -> int:
    """Command line."""
    parser, warm_up = parse()
    import megatron_xmoe.metrics as metrics
    from megatron_xmoe.training.main import main as train

    use, begun = metrics.set_moe_metrics_tracker, []

    def take_turns(tracker) -> None:
        from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
        from megatron.training import get_args, training

        from megatron_xmoe.training.errors import UsageError

        needed = turns_needed(warm_up) * tracker.log_interval
        if (get_args().train_iters or needed) < needed:
            raise UsageError(
                f"--train-iters is {get_args().train_iters}; {turns_needed(warm_up)} turns of --log-interval "
                f"{tracker.log_interval} take {needed}. Fix: more iterations, or a shorter interval"
            )
        begun.append(Turns((tracker, MoEMetricsTracker()), use, tracker.log_interval, time.perf_counter))
        begun[0].accompany(training)

    metrics.set_moe_metrics_tracker = take_turns
    try:
        code = train(PROGRAM_START)
    except SystemExit as end:  # --exit-interval and its like
        code = end.code
    if code:
        return code
    if os.environ["RANK"] != str(int(os.environ["WORLD_SIZE"]) - 1):  # the rank whose log Megatron shows speaks
        return 0
    try:
        print(summary(begun[0].seconds, warm_up), flush=True)
    except ValueError as error:
        parser.error(f"the run ended early: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
