#!/usr/bin/env python3
"""What --xmoe-metrics costs in your own training: a run in which X-MoE's figures are recorded in every other turn.

A turn is as long as Megatron's --log-interval and includes the report at its end. Turns within one run see the same
machine in the same state, which two runs do not. Takes the arguments of pretrain_xmoe.py besides its own.

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
    """Two trackers that take turns, and the time of an iteration in each turn."""

    def __init__(self, trackers: tuple, use: Callable, log_interval: int, clock: Callable[[], float]) -> None:
        """Args: trackers, first the one that records; use, makes one of them Megatron's; clock, in seconds."""
        self.trackers, self.use, self.log_interval, self.clock = trackers, use, log_interval, clock
        self.seconds: list[float] = []  # of an iteration, in each turn; the first one records
        self._began = clock()
        use(trackers[0])

    def iteration_ends(self, iteration: int) -> None:
        """To be called after Megatron's log of each iteration: when that writes a line, the device is done."""
        if iteration % self.log_interval == 0:
            now = self.clock()
            self.seconds.append((now - self._began) / self.log_interval)
            self._began = now
            self.use(self.trackers[len(self.seconds) % 2])


def summary(seconds: list[float], warm_up: int) -> str:
    """Medians and quartiles of turns that record and that do not, and by how much each that records is longer than the
    mean of the two around it, which a machine that gets slower or faster does not change.

    Args: seconds of an iteration in each turn, those that record first; turns of each kind that do not count, one or
        more.

    Raises:
        ValueError: too few turns.
    """
    recording, without = seconds[2 * warm_up : -1 : 2], seconds[2 * warm_up - 1 :: 2]
    if len(recording) < FEWEST:
        needed = 2 * (warm_up + FEWEST)
        raise ValueError(
            f"{len(seconds)} turns; {needed} are needed. Fix: {needed} or more times --log-interval as --train-iters"
        )
    lines = [f"an iteration in {len(recording)} turns of each kind: median (quartiles)"]
    for name, values in (("with X-MoE's figures", recording), ("without", without)):
        low, middle, high = (1e3 * value for value in statistics.quantiles(values, n=4))
        lines.append(f"{name:<22}{middle:>10.2f} ms ({low:.2f} to {high:.2f})")
    around = zip(recording, without, without[1:], strict=False)
    low, middle, high = statistics.quantiles([2 * of / (before + after) - 1 for of, before, after in around], n=4)
    lines.append(f"{'the figures cost':<22}{middle:>10.2%}    ({low:.2%} to {high:.2%})")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = OneLineErrorParser(
        prog="tools/measure_metrics.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--warm-up-turns", type=positive_number(int), default=1, metavar="N",
                        help="turns of each kind that do not count, at the start (default: 1)")  # fmt: skip
    args, of_training = parser.parse_known_args()
    sys.argv[1:] = of_training

    import megatron_xmoe.metrics as metrics
    from megatron_xmoe.training.main import main as train

    use, begun = metrics.set_moe_metrics_tracker, []

    def take_turns(tracker) -> None:
        from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
        from megatron.training import training

        turns = Turns((tracker, MoEMetricsTracker()), use, tracker.log_interval, time.perf_counter)
        begun.append(turns)
        log = training.training_log
        signature = inspect.signature(log)

        def logged(*arguments, **named):
            result = log(*arguments, **named)
            turns.iteration_ends(signature.bind(*arguments, **named).arguments["iteration"])
            return result

        training.training_log = logged

    metrics.set_moe_metrics_tracker = take_turns
    code = train(PROGRAM_START)
    if code:
        return code
    if not begun:
        parser.error("nothing is recorded in this run. Fix: --moe-backend xmoe, and not --xmoe-metrics off")
    try:
        text = summary(begun[0].seconds, args.warm_up_turns)
    except ValueError as error:
        parser.error(str(error))
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):  # whose log Megatron shows
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
