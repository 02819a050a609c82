#!/usr/bin/env python3
"""What --xmoe-metrics costs: forward and backward of a stack of MoE layers, with each setting in turns.

Settings alternate within one run, so that what else the machine does hits all of them. What each iteration pays for
recording is measured apart from the report, which comes every --log-interval iterations and is written to TensorBoard,
if that is installed. Before a report the device is waited for, as Megatron has done by then to read the loss. There is
no attention and no optimizer, which makes the shares that the metrics take upper bounds.

  torchrun --standalone --nproc-per-node 4 tools/benchmark_metrics.py          (GPUs)
  OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tools/benchmark_metrics.py   (no GPU: a small model)
"""

import argparse
import contextlib
import functools
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]

from command_line import OneLineErrorParser, positive_number  # noqa: E402

from megatron_xmoe.platform import cpu, wheel  # noqa: E402

SETTINGS = ("off", "summary", "layers", "layers + breakdown")
WARM_UP = 3

Seconds = dict[str, list[float]]
"""By setting."""


def options(on_gpu: bool) -> argparse.Namespace:
    """Command line; the defaults are X-MoE Small's layers on a GPU."""
    parser = OneLineErrorParser(
        prog="tools/benchmark_metrics.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model, run = parser.add_argument_group("model"), parser.add_argument_group("run")
    sizes = {  # option: (default with GPUs, without, help)
        "--layers": (4, 4, "MoE layers"),
        "--hidden-size": (2048, 256, "hidden size"),
        "--ffn-size": (1408, 128, "FFN size of an expert"),
        "--experts": (64, 16, "experts of all ranks"),
        "--topk": (6, 4, "experts of a token"),
        "--tokens": (8192, 1024, "tokens of a rank"),
        "--rounds": (60, 40, "iterations of each setting"),
        "--log-interval": (10, 10, "iterations from one report to the next"),
    }
    for name, (with_gpu, without, text) in sizes.items():
        default = with_gpu if on_gpu else without
        group = run if name in ("--rounds", "--log-interval") else model
        group.add_argument(name, type=positive_number(int), default=default, metavar="N",
                           help=f"{text} (default: {default})")  # fmt: skip
    args = parser.parse_args()
    if args.rounds < max(2, args.log_interval):
        parser.error(f"--rounds is {args.rounds}; quartiles need 2, and a report --log-interval ({args.log_interval})")
    return args


def build(args: argparse.Namespace, device, dtype, ranks: int) -> list:
    """The layers, with expert parallelism over all ranks."""
    import torch
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xmoe.experts import XMoEGroupedMLP
    from megatron_xmoe.layer import XMoELayer

    config = TransformerConfig(
        num_layers=args.layers, hidden_size=args.hidden_size, num_attention_heads=1, num_moe_experts=args.experts,
        moe_router_topk=args.topk, moe_ffn_hidden_size=args.ffn_size, ffn_hidden_size=args.ffn_size,
        add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False, gradient_accumulation_fusion=False, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall", params_dtype=dtype, bf16=dtype == torch.bfloat16,
        expert_model_parallel_size=ranks, use_cpu_initialization=device.type == "cpu",
    )  # fmt: skip
    submodules = get_moe_module_spec(use_te=False, num_experts=args.experts).keywords["submodules"]
    layers = []
    for number in range(1, args.layers + 1):
        layer = XMoELayer(config, submodules=replace(submodules, experts=XMoEGroupedMLP)).to(device)
        layer.set_layer_number(number)
        layers.append(layer)
    return layers


def trackers(args: argparse.Namespace) -> dict:
    """A tracker for each setting, as the training program installs it."""
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

    from megatron_xmoe.metrics import XMoETracker

    make = functools.partial(XMoETracker, args.layers, args.experts, args.log_interval)
    return {
        "off": MoEMetricsTracker(),
        "summary": make("summary", False),
        "layers": make("layers", False),
        "layers + breakdown": make("layers", True),
    }


def measure(args: argparse.Namespace, layers: list, x, writer) -> tuple[Seconds, Seconds]:
    """Seconds of each iteration, and of each report, by setting (on a CPU: of processor time); settings take turns."""
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

    # another program on the same cores does not add to a process's own time; a GPU has to be waited for
    clock = time.perf_counter if x.is_cuda else time.process_time
    iterations: Seconds = {setting: [] for setting in SETTINGS}
    reports: Seconds = {setting: [] for setting in SETTINGS}
    all_trackers = trackers(args)
    for iteration in range(1, WARM_UP + args.rounds + 1):
        first, is_logged = iteration % len(SETTINGS), iteration % args.log_interval == 0
        for setting in SETTINGS[first:] + SETTINGS[:first]:
            tracker = all_trackers[setting]
            set_moe_metrics_tracker(tracker)
            dist.barrier()
            torch.cuda.synchronize()
            begin = clock()
            hidden = x.requires_grad_()
            for layer in layers:
                hidden = hidden + layer(hidden)[0]
            hidden.float().square().mean().backward()
            torch.cuda.synchronize()
            trained = clock()
            tracker.report(loss_scale=1.0, iteration=iteration, writer=writer, track_names=[], num_layers=args.layers)
            torch.cuda.synchronize()
            reported = clock()
            if iteration > WARM_UP:
                iterations[setting].append((trained if is_logged else reported) - begin)
                if is_logged:
                    reports[setting].append(reported - trained)
    return iterations, reports


def tensorboard_writer(folder: str):
    """A writer on the last rank, as Megatron has it, or None; and what to say of it."""
    import torch.distributed as dist

    if dist.get_rank() != dist.get_world_size() - 1:
        return None, ""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None, "TensorBoard is not installed, so nothing is written: pip install tensorboard"
    return SummaryWriter(folder), "the last rank writes to TensorBoard"


def main() -> None:
    """Command line."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    on_gpu = not cpu.needed()
    args = options(on_gpu)
    if not on_gpu:
        cpu.install()
    wheel.install()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    rank = int(os.environ.get("LOCAL_RANK", 0))
    device, dtype = (torch.device("cuda", rank), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    x = torch.randn(args.tokens, 1, args.hidden_size, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        writer, note = tensorboard_writer(folder)
        with contextlib.redirect_stdout(io.StringIO()):  # the tables of stages
            measured = measure(args, build(args, device, dtype, ranks), x, writer)
        if dist.get_rank() == ranks - 1:
            print(f"{ranks} rank(s), {torch.cuda.get_device_name() if on_gpu else 'CPU'}, {vars(args)}; {note}")
            print(table(*measured, args.log_interval), flush=True)
            if writer is not None:
                writer.close()
    dist.destroy_process_group()


def table(iterations: Seconds, reports: Seconds, log_interval: int) -> str:
    """Medians: an iteration, what recording adds to the round's own 'off', a report of the last rank, and both."""
    intervals = dict.fromkeys((log_interval, 1))
    ends = "".join(f"{f'report every {interval}':>17}" for interval in intervals)
    lines = [f"{'--xmoe-metrics':<20}{'iteration':>12}{'recording':>11}{'quartiles':>19}{'a report':>11}{ends}"]
    off = statistics.median(iterations["off"])
    for setting, times in iterations.items():
        added = [time / without - 1 for time, without in zip(times, iterations["off"], strict=True)]
        low, recording, high = statistics.quantiles(added, n=4)
        report, of_off = (statistics.median(reports[name]) for name in (setting, "off"))
        totals = "".join(f"{recording + (report - of_off) / interval / off:>17.2%}" for interval in intervals)
        quartiles = f"{low:.2%} to {high:.2%}"
        lines.append(
            f"{setting:<20}{statistics.median(times) * 1e3:>9.2f} ms{recording:>11.2%}{quartiles:>19}"
            f"{report * 1e3:>8.2f} ms{totals}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
