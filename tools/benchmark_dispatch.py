#!/usr/bin/env python3
"""Times the dispatchers, alltoall against rbd, and counts what they put on the wire. Start it with torchrun.

For every shape and division into nodes, a rank's average, predicted for uniform routing and counted from the
exchanges' split sizes: rows that it sends to other nodes and to other ranks of its node, one way; bytes of dispatch
and combine together; bytes of metadata for each route. Then the number of exchanges of the forward and of the
backward pass, the median times of dispatch, combine and their backward, the slowest rank's, and the time of each
stage in passes whose exchanges run one by one ("rows between nodes": all that go over the whole group, those to the
own node included). With --layer the whole layer with grouped experts: forward, and forward with backward.

It fails if the dispatchers' outputs or gradients differ, or if a dispatcher returns other rows between nodes than its
routes demand: every route to another node (alltoall), every (token, other node) pair (rbd).

--emulate-nodes lets NCCL believe that the GPUs of this host are spread over nodes: it uses NVLink inside such a node
and TCP sockets on the loopback device between them, about 5 GB/s a rank. The bytes are real, the network is slow.
With fewer GPUs than ranks, nodes share them: start nvidia-cuda-mps-control -d first, or they also take turns.
With gloo, nodes are a division of the ranks; times say nothing about networks there.

examples:
  torchrun --nproc-per-node 4 tools/benchmark_dispatch.py --emulate-nodes 2 --layer --check-syncs
  torchrun --nproc-per-node 4 tools/benchmark_dispatch.py --device cpu --ranks-per-node 2 1,3 --shapes 64,2,8,32
"""

import json
import logging
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.distributed as dist

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]  # works without an installation, too

from command_line import OneLineErrorParser, UserError, finished_files, positive_number, run_tool  # noqa: E402

PROG = "tools/benchmark_dispatch.py"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GPU_SHAPES, CPU_SHAPES = "4096,8,256,7168;4096,6,64,2048", "256,4,16,64"


class Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is."""


def shapes(text: str) -> list[tuple[int, int, int, int]]:
    """Reads "T,K,E,H" or several of them, separated by semicolons."""
    try:
        found = [tuple(int(n) for n in part.split(",")) for part in text.split(";")]
    except ValueError:
        found = []
    if not found or any(len(shape) != 4 or min(shape) < 1 or shape[1] > shape[2] for shape in found):
        raise ArgumentTypeError(f"{text!r} is not T,K,E,H (four numbers above 0, K at most E; several with ';')")
    return found


def parse(argv: list[str] | None) -> Namespace:
    """Reads the command line."""
    parser = OneLineErrorParser(prog=PROG, description=__doc__, formatter_class=Formatter)
    gpu = torch.cuda.is_available()
    what = parser.add_argument_group("what is measured")
    what.add_argument("--shapes", type=shapes, default=GPU_SHAPES if gpu else CPU_SHAPES, metavar="T,K,E,H[;...]",
                      help="tokens of a rank, experts of a token, experts, hidden size")  # fmt: skip
    what.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32", help="of the rows")
    what.add_argument("--layer", action="store_true", help="also the whole layer with grouped experts")
    what.add_argument("--ffn", type=positive_number(int), default=2048 if gpu else 32, help="FFN size of the experts")
    once = "fail unless the layer waits for the GPU once forward (one rank in 16 bits: never), and never backward"
    what.add_argument("--check-syncs", action="store_true", help=once)
    where = parser.add_argument_group("where")
    where.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu", help="NCCL or gloo")
    where.add_argument("--expert-parallel-size", type=positive_number(int), metavar="G",
                       help="ranks of an expert-parallel group; all, if it is not given")  # fmt: skip
    divisions = "divisions into nodes as --xmoe-ranks-per-node has it; found out, if not given"
    where.add_argument("--ranks-per-node", nargs="+", metavar="SIZE[,...]", help=divisions)
    where.add_argument("--emulate-nodes", metavar="SIZE[,...]",
                       help="make NCCL treat so many ranks of this host as a node, and use this division")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--warm-up", type=positive_number(int), default=5, help="passes that are not timed")
    how.add_argument("--iterations", type=positive_number(int), default=20 if gpu else 5, help="timed passes")
    how.add_argument("--json", help="also write all figures to this file")
    args = parser.parse_args(argv)
    args.dtype, args.device = DTYPES[args.dtype], torch.device(args.device)
    _check(args)
    return args


def _check(args: Namespace) -> None:
    if "RANK" not in os.environ:
        raise UserError("no RANK in the environment. Fix: start it as torchrun --nproc-per-node N " + PROG)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here. Fix: use --device cpu")
    if args.check_syncs and args.device.type == "cpu":
        raise UserError("--check-syncs: a CPU has nothing to wait for. Fix: use --device cuda")
    if args.emulate_nodes and args.ranks_per_node:
        raise UserError("--emulate-nodes and --ranks-per-node both divide the ranks. Fix: leave one of them out")
    if args.emulate_nodes and args.device.type == "cpu":
        raise UserError("--emulate-nodes is for NCCL. Fix: use --ranks-per-node with --device cpu")
    world = int(os.environ["WORLD_SIZE"])
    args.expert_parallel_size = args.expert_parallel_size or world
    if world % args.expert_parallel_size:
        raise UserError(f"--expert-parallel-size {args.expert_parallel_size} does not divide {world} processes. Fix: "
                        "change one of them")  # fmt: skip
    for shape in args.shapes:
        if shape[2] % args.expert_parallel_size:
            raise UserError(f"{shape[2]} experts of --shapes cannot be shared evenly by {args.expert_parallel_size} "
                            "expert-parallel ranks. Fix: change one of them")  # fmt: skip


def start(args: Namespace) -> None:
    """Bring up the process group, on a CPU with the stand-ins that Megatron needs, and the groups of the layout."""
    from megatron_xmoe.platform import cpu

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if args.device.type == "cpu":
        if cpu.needed():
            cpu.install()
        # one generator stands for both
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    else:
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    from megatron_xmoe.parallel_state import parse_ranks_per_node

    try:
        for division in [*(args.ranks_per_node or ()), *filter(None, [args.emulate_nodes])]:
            sizes = parse_ranks_per_node(division, world)
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.emulate_nodes:
        node = next(n for n in range(len(sizes)) if rank < sum(sizes[: n + 1]))
        if torch.cuda.device_count() < world:
            args.device = torch.device("cuda", rank - sum(sizes[:node]))
        os.environ.update(NCCL_HOSTID=f"node{node}", NCCL_SOCKET_IFNAME="lo", NCCL_SOCKET_NTHREADS="8",
                          NCCL_NSOCKS_PERTHREAD="4")  # fmt: skip
        args.ranks_per_node = [args.emulate_nodes]
    if args.device.type == "cuda":
        if args.device.index >= torch.cuda.device_count():
            raise UserError(f"rank {rank} needs GPU {args.device.index}, and there are {torch.cuda.device_count()}. "
                            "Fix: start fewer processes, or let smaller emulated nodes share the GPUs")  # fmt: skip
        torch.cuda.set_device(args.device)
    dist.init_process_group("gloo" if args.device.type == "cpu" else "nccl")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=args.expert_parallel_size, create_gloo_process_groups=False
    )


def say(*lines: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(*lines, sep="\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code, 1 if something it checks does not hold."""
    args = parse(argv)
    start(args)
    from dispatch_cases import Repeat, barrier
    from dispatch_report import measure

    args.repeat = Repeat(args.warm_up, args.iterations)
    machine = torch.cuda.get_device_name() if args.device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    how = ", emulated nodes" if args.emulate_nodes else ""
    say(f"{dist.get_world_size()} x {machine}, torch {torch.__version__}, {dist.get_backend()}{how}")
    records = [
        measure(shape, division, args, say) for shape in args.shapes for division in args.ranks_per_node or [None]
    ]
    if args.json and dist.get_rank() == 0:
        content = {"machine": machine, "torch": torch.__version__, "world": dist.get_world_size(),
                   "emulated": args.emulate_nodes, "figures": records}  # fmt: skip
        with finished_files(args.json) as (unfinished,):
            Path(unfinished).write_text(json.dumps(content, indent=1) + "\n")
    barrier(args.device)
    dist.destroy_process_group()
    return int(any(record["problems"] for record in records))


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
