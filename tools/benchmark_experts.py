#!/usr/bin/env python3
"""Times the experts' MLP, from unpermuted tokens to the combined output, against other implementations in one run.

Rivals: a loop over the experts; torch's grouped_mm between index operations; Megatron's SequentialMLP; Liger,
ScatterMoE, SonicMoE and moe_ops where they are installed; and a dense matrix product of as many operations, which is
what the device can do. SwiGLU, no biases. Routing is unbalanced: normal scores plus half a normal offset for each
expert.

Columns: milliseconds and TFLOP/s of the forward pass (6*T*K*d*n FLOP) and of forward and backward (18*T*K*d*n), the
latter as a share of the dense product; bytes a token that are kept between the two, weights aside (2d + 4Kn is the
least in 16 bits); peak bytes a token above what was there before, on a GPU. Times are medians.

Example: python tools/benchmark_experts.py --shapes 8192,2048,1408,64,6 --stages --json experts.json
"""

import json
import os
import sys
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import torch
from command_line import OneLineErrorParser, UserError, finished_files, positive_number, run_tool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation, too

import expert_stages  # noqa: E402
from benchmark_ops import DTYPES, milliseconds  # noqa: E402
from expert_systems import TOLERANCE, Inputs, Shape, System, loop, own_systems, reason_of, rivals  # noqa: E402

from megatron_xmoe._optional import probe  # noqa: E402
from megatron_xmoe.kernels.grouped_gemm import BACKENDS  # noqa: E402

PROG = "tools/benchmark_experts.py"
# T, d, n, E, K
SHAPES = (
    (8192, 2048, 1408, 64, 6),
    (16384, 2048, 768, 128, 8),
    (32768, 2048, 768, 128, 8),
    (4096, 7168, 2048, 32, 8),
    (32768, 4096, 1024, 128, 8),
)
HEAD = ("forward ms", "TFLOP/s", "fwd+bwd ms", "TFLOP/s", "of dense", "kept B/token", "peak B/token")


def gradients(system: System, data: Inputs, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All gradients, given the output."""
    if system.backward is not None:
        return system.backward(output)
    return torch.autograd.grad(output, system.leaves or data.leaves, data.grad)


def kept_bytes(system: System, data: Inputs) -> int:
    """Bytes that the forward pass keeps for the backward, each storage once, weights aside."""
    weights = {leaf.untyped_storage().data_ptr() for leaf in (system.leaves or data.leaves)[2:]}
    storages: dict[int, int] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        output = system.forward()
    del output
    return sum(storages.values())


def peak_bytes(system: System, data: Inputs) -> int | None:
    """Most bytes in use during forward and backward, above those before; unknown on a CPU."""
    if data.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(system, data, system.forward())
    return torch.cuda.max_memory_allocated() - before


def problem(system: System, data: Inputs, expected: list[torch.Tensor]) -> str:
    """What is wrong with a system's output and its gradients of tokens and routing weights; '' if nothing is."""
    output = system.forward()
    found = [output.detach(), *gradients(system, data, output)[:2]]
    for name, a, b in zip(("output", "tokens' gradient", "weights' gradient"), found, expected, strict=True):
        error = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if not error <= TOLERANCE[data.dtype]:  # NaN compares false
            return f"{name} has a relative RMS error of {error:.2g}"
    return ""


def time_system(system: System, data: Inputs, args: Namespace) -> dict:
    """One system's figures."""
    tokens = data.shape[0]
    forward = milliseconds(system.forward, data.device)
    both = milliseconds(lambda: gradients(system, data, system.forward()), data.device)
    kept = kept_bytes(system, data) if system.backward is None else None
    peak = peak_bytes(system, data)
    return {
        "shape": data.shape,
        "system": system.name,
        "forward_ms": forward,
        "both_ms": both,
        "forward_tflops": data.flop / forward / 1e9,
        "both_tflops": 3 * data.flop / both / 1e9,
        "kept_bytes_a_token": None if kept is None else kept / tokens,
        "peak_bytes_a_token": None if peak is None else peak / tokens,
    }


def measure(shape: Shape, args: Namespace) -> list[dict]:
    """Times everything for one shape and prints a line per system; returns a record per system and stage."""
    data = Inputs(shape, args.dtype, args.device)
    tokens, hidden, ffn, experts, per_token = shape
    least = args.dtype.itemsize * (hidden + 2 * per_token * ffn)
    print(f"\nT{tokens} d{hidden} n{ffn} E{experts} K{per_token}; least to keep {least} bytes a token", flush=True)
    print(f"{'':26}" + "".join(f"{column:>14}" for column in HEAD))
    found, left_out = rivals(data, args.rivals)
    ours, not_ours = own_systems(data, args.grouped_gemm)
    reference = loop(data)
    output = reference.forward()
    expected = [output.detach(), *gradients(reference, data, output)[:2]]
    del output
    records, dense = [], None
    for system in [*found, *ours]:
        try:
            wrong = problem(system, data, expected) if system.agrees else ""
            record = time_system(system, data, args)
        except Exception as error:  # a shape or a type that a package does not take, or too little memory
            if system in ours:
                raise
            left_out.append(f"{system.name}: {reason_of(error)}")
            continue
        dense = record["both_ms"] if system.name == "dense GEMM" else dense
        record |= {"of_dense": dense and dense / record["both_ms"], "agrees": not wrong}
        records.append(record)
        verdict = "" if not system.agrees else f"DIFFERS: {wrong}" if wrong else "agrees"
        print(f"{system.name:26}{row(record)}   {verdict}", flush=True)
    print("not timed: " + "; ".join([*left_out, *not_ours]) if left_out or not_ours else "nothing was left out")
    if args.stages:
        for name in dict.fromkeys(system.name.split(", ")[1] for system in ours):
            records += expert_stages.measure(name, data, partial(milliseconds, device=data.device))
    return records


def row(record: dict) -> str:
    """A line of the table."""
    bytes_a_token = record["kept_bytes_a_token"], record["peak_bytes_a_token"]
    cells = [
        f"{record['forward_ms']:.3f}",
        f"{record['forward_tflops']:.3g}",
        f"{record['both_ms']:.3f}",
        f"{record['both_tflops']:.3g}",
        "-" if record["of_dense"] is None else f"{record['of_dense']:.0%}",
        *("-" if value is None else f"{value:.0f}" for value in bytes_a_token),
    ]
    return "".join(f"{cell:>14}" for cell in cells)


def shapes(text: str) -> tuple[Shape, ...]:
    """Reads "T,d,n,E,K" or several of them, separated by blanks or semicolons."""
    try:
        found = tuple(tuple(int(n) for n in part.split(",")) for part in text.replace(";", " ").split())
    except ValueError:
        found = ()
    if not found or any(len(shape) != 5 or min(shape) < 1 or shape[4] > shape[3] for shape in found):
        raise ArgumentTypeError(f"{text!r} is not T,d,n,E,K (five numbers above 0, K at most E; several with ';')")
    return found


def parse(argv: list[str] | None) -> Namespace:
    """Reads the command line."""
    parser = OneLineErrorParser(prog=PROG, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    default = "; ".join(",".join(map(str, shape)) for shape in SHAPES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    what = parser.add_argument_group("what is timed")
    what.add_argument("--shapes", type=shapes, default=default,
                      help=f"T,d,n,E,K, several with ';' (default: {default})")  # fmt: skip
    what.add_argument("--dtype", choices=DTYPES, default="bf16", help="of rows and weights (default: bf16)")
    names = ("all", *BACKENDS)
    what.add_argument("--grouped-gemm", choices=names, default="all", help="our backend of the products (default: all)")
    what.add_argument("--rivals", nargs="+", metavar="NAME", default=["all"],
                      help="of others only these, by a part of their name; the dense product is always timed (default: "
                           "all)")  # fmt: skip
    what.add_argument("--stages", action="store_true", help="also time each stage of ours beside its own floor")
    where = parser.add_argument_group("where, and to what file")
    where.add_argument("--device", choices=("cuda", "cpu"), default=device,
                       help=f"of the times (default here: {device})")  # fmt: skip
    where.add_argument("--threads", type=positive_number(int), help="of torch on a CPU (default: torch's)")
    where.add_argument("--json", help="also write all figures to this file (default: to none)")
    args = parser.parse_args(argv)
    args.dtype, args.device = DTYPES[args.dtype], torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here. Fix: use --device cpu")
    if args.device.type == "cuda" and not probe("triton").usable:
        raise UserError(f"--device cuda: times are taken with triton.testing, and triton is {probe('triton').reason}")
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
        records += measure(shape, args)
        if gpu:
            torch.cuda.empty_cache()
    if args.json:
        content = {"machine": machine, "torch": torch.__version__, "dtype": str(args.dtype), "figures": records}
        with finished_files(args.json) as (unfinished,):
            Path(unfinished).write_text(json.dumps(content, indent=1) + "\n")
    if any(not record.get("agrees", True) for record in records):
        raise UserError("results differ, see above")


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
