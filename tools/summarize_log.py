#!/usr/bin/env python3
"""Median iteration time, TFLOP/s, tokens/s, peak memory and losses from the console log of a Megatron run."""

import argparse
import re
from pathlib import Path
from statistics import median

PATTERNS = {
    "milliseconds": r"elapsed time per iteration \(ms\): ([0-9.]+)",
    "tflops": r"throughput per GPU \(TFLOP/s/GPU\): ([0-9.]+)",
    "loss": r" lm loss: ([-+0-9.E]+|nan)",
    "memory": r"max allocated: ([0-9.]+)",
}


def read(log: Path) -> dict[str, list[float]]:
    """All figures of each kind, in the order of the log."""
    text = log.read_text()
    return {name: [float(value) for value in re.findall(pattern, text)] for name, pattern in PATTERNS.items()}


def summary(figures: dict[str, list[float]], skip: int, tokens: int, gpus: int) -> str:
    """One line; medians leave out the first `skip` iterations."""
    times = figures["milliseconds"][skip:]
    if not times:
        raise SystemExit(f"error: the log has no more than {skip} iterations. Fix: train longer, or lower --skip")
    milliseconds = median(times)
    parts = [f"{milliseconds:.1f} ms an iteration ({min(times):.1f} to {max(times):.1f})"]
    if figures["tflops"]:
        parts.append(f"{median(figures['tflops'][skip:]):.1f} TFLOP/s a GPU")
    if tokens:
        parts.append(f"{tokens / milliseconds * 1e3 / gpus:.0f} tokens/s a GPU")
    if figures["memory"]:
        parts.append(f"peak {max(figures['memory']):.0f} MB")
    losses = figures["loss"]
    parts.append("losses " + " ".join(f"{loss:.4f}" for loss in losses))
    return ", ".join(parts)


def main() -> None:
    """Command line."""
    example = "Example: python tools/summarize_log.py run.log --gpus 8"
    parser = argparse.ArgumentParser(description=__doc__, epilog=example)
    parser.add_argument("log", type=Path, help="console log of pretrain_xmoe.py, with --log-interval 1")
    parser.add_argument("--name", default="", help="what to call the run (default: nothing)")
    parser.add_argument("--skip", type=int, default=4, help="warm-up iterations left out of the medians (default: 4)")
    parser.add_argument("--tokens-per-iteration", type=int, default=0, help="global batch size times sequence length, "
                        "for tokens/s (default: 0, which leaves them out)")  # fmt: skip
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs of the run (default: 1)")
    args = parser.parse_args()
    print(f"{args.name}: {summary(read(args.log), args.skip, args.tokens_per_iteration, args.gpus)}", flush=True)


if __name__ == "__main__":
    main()
