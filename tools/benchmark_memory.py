#!/usr/bin/env python3
"""Measures what sequence-sharded MoE blocks (SSMB) save: activation memory, peak memory and step time of real layers.

Transformer layers with X-MoE blocks run forward and backward on every GPU here (or on CPU processes, without peak and
with meaningless times), for each tensor-parallel size (--tp) and each way to handle the block's sequence (--modes):

  off         every tensor-parallel rank computes all tokens
  on          every rank takes its share of the sequence (--xmoe-sequence-shard on)
  sp          Megatron's --sequence-parallel, which shards norms and residuals, too
  checkpoint  off, and the MoE block is recomputed in the backward
  full        off, and every layer is recomputed in the backward

All processes are used at each size: what tensor parallelism leaves is data parallelism. Experts are whole and spread
over all processes. Optimizer states and data-parallel gradient exchange are left out.

Next to the figures stand the paper's formulas: SSMB saves 4*c*K*S*H*(G-1)/G bytes a layer and micro-batch in half
precision, and more than sharding the experts does if K/F > 2/(c*S).
"""

import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from command_line import OneLineErrorParser, UserError, finished_files, positive_number, run_tool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation, too

PROG = "tools/benchmark_memory.py"
MODES = ("off", "on", "sp", "checkpoint", "full")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXAMPLES = """examples:
  python tools/benchmark_memory.py --preset large --layers 2 --tp 1 2 4 --json memory.json      # on the GPUs here
  python tools/benchmark_memory.py --preset large --sequence 8192 --tp 8 --formulas              # measures nothing
"""


@dataclass(frozen=True)
class Model:
    """Sizes of the layers: K experts of E per token, H hidden, F expert FFN, S sequence, B micro-batch."""

    layers: int
    hidden: int
    ffn: int
    experts: int
    topk: int
    sequence: int
    heads: int
    micro_batch: int = 1
    capacity_factor: float | None = None
    shared_ffn: int | None = None

    def paper_saving(self, tp: int) -> float:
        """Bytes that SSMB saves a layer and micro-batch (paper, SSMB); nothing is dropped at c = 1."""
        tokens = self.sequence * self.micro_batch
        return 4 * (self.capacity_factor or 1) * self.topk * tokens * self.hidden * (tp - 1) / tp

    def break_even(self) -> float:
        """Sequence length above which SSMB saves more than sharding the experts over the same ranks."""
        return 2 * self.ffn / ((self.capacity_factor or 1) * self.topk)


# of the paper, each with two layers; the last is for CPUs
PRESETS = {
    "small": Model(2, 2048, 1408, 64, 6, 2048, 16, 4),
    "medium": Model(2, 5120, 1536, 128, 6, 4096, 128),
    "large": Model(2, 7168, 2048, 256, 8, 4096, 128),
    "toy": Model(2, 64, 32, 8, 4, 256, 4),
}


class SavedBytes:
    """Counts bytes that autograd keeps for the backward: every storage once, parameters not at all."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter]):
        self.known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.counting = False
        self.of = {"block": 0, "rest": 0}

    @contextmanager
    def kept_in(self, part: str) -> Iterator[None]:
        """Counts what is saved within it, as part of `part`."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:  # none is freed before the backward
                self.known.add(storage.data_ptr())
                self.of[part] += storage.nbytes()
            return tensor

        if not self.counting:
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def build(model: Model, tp: int, mode: str, dtype: torch.dtype) -> torch.nn.Module:
    """The layers, with Megatron's attention and X-MoE's blocks."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xmoe.config import XMoEConfig
    from megatron_xmoe.specs import substitute, substitutions

    recompute = {
        "checkpoint": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    config = TransformerConfig(
        num_layers=model.layers, hidden_size=model.hidden, num_attention_heads=model.heads,
        ffn_hidden_size=model.ffn, moe_ffn_hidden_size=model.ffn, num_moe_experts=model.experts,
        moe_router_topk=model.topk, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01,
        moe_router_dtype="fp32", moe_token_dispatcher_type="alltoall",
        moe_expert_capacity_factor=model.capacity_factor, moe_shared_expert_intermediate_size=model.shared_ffn,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, normalization="LayerNorm",
        init_method_std=0.014, params_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
        tensor_model_parallel_size=tp, sequence_parallel=mode == "sp", expert_tensor_parallel_size=1,
        expert_model_parallel_size=dist.get_world_size(), transformer_impl="local",
        gradient_accumulation_fusion=False, bias_dropout_fusion=False, bias_activation_fusion=False,
        masked_softmax_fusion=False, **recompute.get(mode, {}),
    )  # fmt: skip
    xmoe = XMoEConfig(moe_backend="xmoe", xmoe_sequence_shard="on" if mode == "on" else "off")
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="LayerNorm")
    block = TransformerBlock(config, substitute(spec, substitutions(config, xmoe)), post_layer_norm=False)
    block.to(torch.cuda.current_device())
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.grad = torch.zeros_like(parameter)
    return block.train()


def measure(model: Model, tp: int, mode: str, dtype: torch.dtype, steps: int) -> dict:
    """Figures of this rank for one mode: bytes kept a layer, peak above weights and gradients, step time."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    gpu = torch.cuda.is_available()
    block = build(model, tp, mode, dtype)
    saved = SavedBytes(block.parameters())
    for layer in block.layers:
        layer.mlp.forward = _counted(layer.mlp.forward, saved)
    device = torch.device(torch.cuda.current_device())
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    shape = (model.sequence, model.micro_batch, model.hidden)
    x, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    if mode == "sp":
        share = parallel_state.get_tensor_model_parallel_rank()
        x, grad = x.chunk(tp)[share].clone(), grad.chunk(tp)[share].clone()
    x.requires_grad_()
    x.grad = torch.zeros_like(x)
    times, before, peak = [], 0, 0
    for step in range(steps + 2):  # two for warming up; the first one counts
        if gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        start = time.perf_counter()
        saved.counting = step == 0
        with saved.kept_in("rest"):
            output = block(x, attention_mask=None)
        saved.counting = False
        output.backward(grad)
        del output
        if gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        if step >= 2:
            times.append(time.perf_counter() - start)
        get_moe_metrics_tracker().clear()
    return {
        "block_bytes": saved.of["block"] / model.layers,
        "layer_bytes": (saved.of["block"] + saved.of["rest"]) / model.layers,
        "peak_bytes": peak if gpu else None,
        "step_ms": statistics.median(times) * 1e3,
    }


def _counted(forward, saved: SavedBytes):
    def counted(*args, **kwargs):
        with saved.kept_in("block"):
            return forward(*args, **kwargs)

    return counted


def run_rank(rank: int, world_size: int, store: str, model: Model, tp: int, args: Namespace) -> None:
    """One process: all modes at one tensor-parallel size; rank 0 leaves the ranks' largest figures in a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from megatron_xmoe.platform import cpu, wheel

    if cpu.needed():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        cpu.install()
    else:
        torch.cuda.set_device(rank)
    wheel.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    backend = "gloo" if cpu.needed() else "nccl"
    dist.init_process_group(
        backend, store=dist.FileStore(f"{store}/store", world_size), rank=rank, world_size=world_size
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=world_size, expert_tensor_parallel_size=1
    )
    records = []
    for mode in args.modes:
        if tp == 1 and mode in ("on", "sp"):
            continue  # the same as off
        model_parallel_cuda_manual_seed(1)
        figures = measure(model, tp, mode, DTYPES[args.dtype], args.steps)
        everywhere: list = [None] * world_size
        dist.all_gather_object(everywhere, figures)
        largest = {
            name: max(each[name] for each in everywhere) if figures[name] is not None else None for name in figures
        }
        records.append({"tp": tp, "mode": mode, **largest})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if rank == 0:
        Path(store, "records.json").write_text(json.dumps(records))
    dist.destroy_process_group()


def measure_all(model: Model, args: Namespace) -> list[dict]:
    """Runs every size and mode, and prints a line for each."""
    head = "MoE block a layer", "of off", "saved", "paper", "whole layer", "peak", "step"
    print(f"{'TP':>3} {'mode':11}" + "".join(f"{title:>19}" for title in head), flush=True)
    records: list[dict] = []
    for tp in args.tp:
        with tempfile.TemporaryDirectory() as store:
            arguments = (args.processes, store, model, tp, args)
            torch.multiprocessing.start_processes(run_rank, arguments, args.processes, start_method="spawn")
            found = json.loads(Path(store, "records.json").read_text())
        off = next((record["block_bytes"] for record in found if record["mode"] == "off"), None)
        for record in found:
            record["paper_saving_bytes"] = model.paper_saving(tp)
            record["saved_bytes"] = None if off is None else off - record["block_bytes"]
            cells = [
                mebibytes(record["block_bytes"]),
                f"{record['block_bytes'] / off:.3f}" if off else "-",
                mebibytes(record["saved_bytes"]),
                mebibytes(model.paper_saving(tp)) if record["mode"] in ("on", "sp") else "-",
                mebibytes(record["layer_bytes"]),
                mebibytes(record["peak_bytes"]),
                f"{record['step_ms']:.1f} ms",
            ]
            print(f"{tp:>3} {record['mode']:11}" + "".join(f"{cell:>19}" for cell in cells), flush=True)
        records += found
    return records


def mebibytes(number: float | None) -> str:
    """A number of bytes for the table."""
    return "-" if number is None else f"{number / 2**20:.2f} MiB"


def print_formulas(model: Model, sizes: list[int]) -> None:
    """The paper's formulas for this model."""
    for tp in sizes:
        print(f"paper: SSMB saves {mebibytes(model.paper_saving(tp))} a layer and micro-batch at TP {tp}")
    ratio, bound = model.topk / model.ffn, 2 / ((model.capacity_factor or 1) * model.sequence)
    verdict = "more" if ratio > bound else "less"
    print(
        f"paper: K/F = {ratio:.3g}, 2/(c*S) = {bound:.3g}: SSMB saves {verdict} than sharding experts over the same "
        f"ranks; break-even at a sequence of {model.break_even():.0f}",
        flush=True,
    )


def parse(argv: list[str] | None) -> tuple[Model, Namespace]:
    """Reads the command line."""
    gpus = torch.cuda.device_count()
    parser = OneLineErrorParser(
        prog=PROG, description=__doc__, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("model (each of the preset unless given)")
    preset = "large" if gpus else "toy"
    group.add_argument("--preset", choices=PRESETS, default=preset,
                       help=f"a model of the X-MoE paper (default here: {preset})")  # fmt: skip
    sizes = {
        "layers": "number of layers", "hidden": "hidden size, H", "ffn": "FFN size of an expert, F",
        "experts": "number of experts, E", "topk": "experts of a token, K", "sequence": "sequence length, S",
        "heads": "attention heads", "micro_batch": "sequences at a time on a data-parallel rank",
        "shared_ffn": "FFN size of shared experts",
    }  # fmt: skip
    for name, text in sizes.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=positive_number(int), metavar="N",
                           help=f"{text} (default: the preset's)")  # fmt: skip
    factor = "capacity factor, c (default: nothing is dropped, and formulas have c = 1)"
    group.add_argument("--capacity-factor", type=positive_number(float), metavar="C", help=factor)
    group = parser.add_argument_group("layout")
    group.add_argument("--tp", type=positive_number(int), nargs="+", metavar="G",
                       help="tensor-parallel sizes (default: those of 1, 2, 4 that the processes allow)")  # fmt: skip
    count = gpus or 4
    group.add_argument("--processes", type=positive_number(int), default=count, metavar="N",
                       help=f"number of processes, a GPU each if there are any (default here: {count})")  # fmt: skip
    group = parser.add_argument_group("measurement")
    group.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES),
                       help="ways to handle the sequence (default: all)")  # fmt: skip
    group.add_argument("--steps", type=positive_number(int), default=10, metavar="N", help="timed steps (default: 10)")
    group.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and activations (default: bf16)")
    group.add_argument("--formulas", action="store_true", help="print the formulas only")
    parser.add_argument_group("output").add_argument("--json", metavar="FILE",
                                                  help="also write all figures there (default: nowhere)")  # fmt: skip
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in (*sizes, "capacity_factor") if getattr(args, name) is not None}
    model = replace(PRESETS[args.preset], **given)
    args.tp = args.tp or [size for size in (1, 2, 4) if args.processes % size == 0]
    if not args.formulas:
        _check(model, args, gpus)
    return model, args


def _check(model: Model, args: Namespace, gpus: int) -> None:
    if gpus and args.processes > gpus:
        raise UserError(f"--processes {args.processes}: there are {gpus} GPUs. Fix: use at most so many")
    if model.experts % args.processes:
        raise UserError(f"--experts {model.experts} do not divide over {args.processes} processes. Fix: change one")
    if model.topk > model.experts:
        raise UserError(f"--topk {model.topk} is more than --experts {model.experts}. Fix: change one")
    if model.hidden % model.heads:
        raise UserError(f"--hidden {model.hidden} is not divisible by --heads {model.heads}. Fix: change one")
    for tp in args.tp:
        if args.processes % tp or model.heads % tp or model.sequence % tp:
            raise UserError(
                f"--tp {tp} must divide the processes, {args.processes}, the heads, {model.heads}, and the sequence, "
                f"{model.sequence}. Fix: choose another size"
            )


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    model, args = parse(argv)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{args.processes} x {machine}, torch {torch.__version__}, {args.dtype}\n{model}", flush=True)
    print_formulas(model, [size for size in args.tp if size > 1])
    if args.formulas:
        return
    records = measure_all(model, args)
    if args.json:
        content = {"machine": machine, "processes": args.processes, "torch": torch.__version__, "dtype": args.dtype,
                   "model": asdict(model), "break_even_sequence": model.break_even(), "figures": records}  # fmt: skip
        with finished_files(args.json) as (unfinished,):
            Path(unfinished).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(PROG, main))
