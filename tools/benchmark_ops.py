#!/usr/bin/env python3
"""Times routing and row movement: this project's backends, torch's index operations and other packages, in one run.

Columns: metadata (expert-major arrays and the inverse map, from top-k choices); permute; both together; the weighted
unpermute; the backward of permute; the backward of unpermute (rows and the weights' gradient); gather (the same rows
by their token numbers, tokens read K times); choices of map (top-k choices and their weights from a router's map and
probs); gradient of map (back to the probs).

Times are medians in ms. In brackets: the time in which this device copies the same bytes in this run, as a share of
the operation's. Bytes are the least that must move: T*H*b*(1+K), for unpermute's backward T*H*b*(1+2K), for the gather
2*T*K*H*b, with b bytes an element. Routing is unbalanced: normal scores plus half a normal offset for each expert.
Results are compared with plain torch in the same run; of other packages only unpermute(permute(x)), since the order of
their rows is their own.
"""

import json
import os
import statistics
import sys
import time
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command_line import OneLineErrorParser, UserError, finished_files, positive_number, run_tool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation, too

import triton_variants  # noqa: E402
from benchmark_systems import COLUMNS, Inputs, systems  # noqa: E402

from megatron_xmoe._optional import probe  # noqa: E402

PROG = "tools/benchmark_ops.py"
SHAPES = ((4096, 8, 128, 7168), (8192, 6, 64, 2048), (16384, 8, 128, 2048))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WARM_UP_MS, MEASURED_MS = 10, 60  # of an operation on a GPU
CPU_SECONDS, CPU_FEWEST, CPU_MOST = 0.5, 5, 50  # of an operation on a CPU: time spent, repetitions


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of `call`, caches flushed before each run on a GPU."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=WARM_UP_MS, rep=MEASURED_MS, return_mode="median")
    call()
    times: list[float] = []
    while len(times) < CPU_FEWEST or (sum(times) < CPU_SECONDS and len(times) < CPU_MOST):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def copy_times(sizes: set[int], device: torch.device) -> dict[int, float]:
    """Milliseconds for copies that read and write so many bytes in all."""
    result = {}
    for size in sorted(sizes):
        source = torch.randint(-128, 127, (size // 2,), dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        result[size] = milliseconds(lambda to=target, of=source: to.copy_(of), device)
    return result


def measure(shape: tuple[int, int, int, int], args: Namespace) -> list[dict]:
    """Times everything for one shape and prints a line per system; returns a record per figure."""
    data = Inputs(shape, args.dtype, args.device)
    copies = copy_times(set(data.bytes.values()), args.device)
    size, copied = max(copies.items())
    print(f"\nT{shape[0]} K{shape[1]} E{shape[2]} H{shape[3]}, copy {size / copied / 1e9:.3g} TB/s", flush=True)
    print(f"{'':20}" + "".join(f"{column:>20}" for column in COLUMNS))
    found, left_out = systems(data, args.device)
    records = []
    for system in found:
        cells, problem = [], system.check()
        for column in COLUMNS:
            if column not in system.calls:
                cells.append("-")
                continue
            time_ms = milliseconds(system.calls[column], args.device)
            share = copies[data.bytes[column]] / time_ms if column in data.bytes else None
            cells.append(f"{time_ms:.3f}" + (f" ({share:.0%})" if share is not None else "       "))
            records.append(
                {"shape": shape, "system": system.name, "column": column, "ms": time_ms, "share_of_copy": share}
                | {"agrees": not problem}
            )
        verdict = f"DIFFERS: {problem}" if problem else "agrees"
        print(f"{system.name:20}" + "".join(f"{cell:>20}" for cell in cells) + f"   {verdict}", flush=True)
    print("not timed: " + "; ".join(left_out) if left_out else "nothing was left out", flush=True)
    return records


def shapes(text: str) -> tuple[tuple[int, int, int, int], ...]:
    """Reads "T,K,E,H" or several of them, separated by blanks or semicolons."""
    try:
        found = tuple(tuple(int(n) for n in part.split(",")) for part in text.replace(";", " ").split())
    except ValueError:
        found = ()
    if not found or any(len(shape) != 4 or min(shape) < 1 or shape[1] > shape[2] for shape in found):
        raise ArgumentTypeError(f"{text!r} is not T,K,E,H (four numbers above 0, K at most E; several with ';')")
    return found


def parse(argv: list[str] | None) -> Namespace:
    """Reads the command line."""
    example = "Example: python tools/benchmark_ops.py --device cpu --shapes 512,8,64,1024"
    parser = OneLineErrorParser(prog=PROG, description=__doc__, epilog=example,
                                formatter_class=RawDescriptionHelpFormatter)  # fmt: skip
    default = "; ".join(",".join(map(str, shape)) for shape in SHAPES)
    parser.add_argument("--shapes", type=shapes, default=default,
                        help=f"T,K,E,H, several with ';' (default: {default})")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the rows (default: bf16)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device,
                        help=f"where to measure (default: a GPU if there is one, here {device})")  # fmt: skip
    parser.add_argument("--threads", type=positive_number(int), help="of torch on a CPU (default: torch's)")
    parser.add_argument("--json", help="also write all figures to this file (default: to none)")
    variants = "instead time Triton's kernels with other launch parameters, best first (about a minute a shape)"
    parser.add_argument("--variants", action="store_true", help=variants)
    args = parser.parse_args(argv)
    args.dtype, args.device = DTYPES[args.dtype], torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here. Fix: use --device cpu")
    if args.device.type == "cuda" and not probe("triton").usable:
        raise UserError(f"--device cuda: times are taken with triton.testing, and triton is {probe('triton').reason}")
    if args.variants and args.device.type != "cuda":
        raise UserError("--variants: launch parameters matter on a GPU only. Fix: use --device cuda")
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    gpu = args.device.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    print(f"{machine}, torch {torch.__version__}, triton {probe('triton').reason}, {args.dtype}", flush=True)
    records: list[dict] = []
    for shape in args.shapes:
        if args.variants:
            records += triton_variants.measure(Inputs(shape, args.dtype, args.device), milliseconds)
        else:
            records += measure(shape, args)
    if args.json:
        content = {"machine": machine, "torch": torch.__version__, "dtype": str(args.dtype), "figures": records}
        with finished_files(args.json) as (unfinished,):
            Path(unfinished).write_text(json.dumps(content, indent=1) + "\n")
    if any(not record.get("agrees", True) for record in records):
        raise UserError("results differ, see above")


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
