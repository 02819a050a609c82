#!/usr/bin/env python3
"""Builds one rank of a training job without the others, and counts its parameters, its memory and the whole model's.

    python tools/dry_run.py --gpus 256 --rank 0 <the options of pretrain_xmoe.py>
    bash tools/recipes/xmoe_small.sh --dry-run

Groups, shards and checks of the command line are those of the real job (Megatron's fake process group); nothing is sent
and nothing is trained. The rank is built with real weights and optimizer where its memory is there, else with tensors
that have shapes and no values. The whole model is built a second time, in one piece and without values. The last line
is `parameters: N`, the number of the model's parameters without the rows that pad its vocabulary.
"""

import argparse
import copy
import logging
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]  # works without an installation, too

from command_line import OneLineErrorParser, positive_number  # noqa: E402
from memory_estimate import GIB, Rank, activation_bytes, state_bytes  # noqa: E402

# part of the model -> what the names of its parameters contain; the first that fits counts
PARTS = {
    "experts": ".mlp.experts.",
    "shared experts": ".mlp.shared_experts.",
    "router": ".mlp.router.",
    "attention": ".self_attention.",
    "dense FFN": ".mlp.",
    "embedding": "embedding.",
    "output layer": "output_layer.",
    "norms": "norm.",
    "other": "",
}
DATA_OPTIONS = ("--mock-data", "--data-path", "--data-args-path", "--train-data-path", "--per-split-data-args-path")
# what spreads a model over ranks, and its value for a model in one piece
IN_ONE_PIECE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This tool's options, and the rest, which is that of pretrain_xmoe.py."""
    parser = OneLineErrorParser(
        prog="dry_run.py",
        description=__doc__.split("\n\n")[0],
        epilog="All other options are those of pretrain_xmoe.py. Example: python "
        "tools/dry_run.py --gpus 64 --rank 8 $(cat megatron_args.txt) --expert-model-parallel-size 8",
    )
    parser.add_argument("--gpus", type=positive_number(int), metavar="N", default=os.environ.get("WORLD_SIZE", "1"),
                        help="number of GPUs of the job (default: WORLD_SIZE, or 1)")  # fmt: skip
    parser.add_argument("--rank", type=int, metavar="R", default=os.environ.get("RANK", "0"),
                        help="the one to build (default: RANK, or 0)")  # fmt: skip
    parser.add_argument("--memory-limit", type=float, metavar="GIB",
                        help="build the rank with real tensors if weights, gradients and optimizer need no more; 0: "
                        "never (default: what is free on the GPU; a quarter of what is free without one)")  # fmt: skip
    options, rest = parser.parse_known_args(argv)
    if not 0 <= options.rank < options.gpus:
        parser.error(f"--rank is {options.rank}; it must be between 0 and --gpus - 1, {options.gpus - 1}")
    if not any(word.split("=")[0] in DATA_OPTIONS for word in rest):
        rest.append("--mock-data")  # the data does not change the model
    return options, [*rest, "--fake-process-group"]


def main(argv: list[str] | None = None) -> int:
    """Build, count, print; returns the exit code."""
    options, rest = parse(argv)
    results = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # Megatron prints all its arguments
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.update(WORLD_SIZE=str(options.gpus), RANK=str(options.rank), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT="0")  # fmt: skip
    from megatron_xmoe.platform import cpu, wheel
    from megatron_xmoe.training.errors import UsageError, one_line

    on_cpu = cpu.needed()
    stand_ins = cpu.install() if on_cpu else []
    repairs = wheel.install()
    from megatron_xmoe.training.main import prepare

    try:
        sys.argv = ["dry_run.py", *rest]  # Megatron's parser reads it
        job = prepare(on_cpu, len(stand_ins), len(repairs), run=lambda container, _: dry_run(container, options))
        print("\n".join(job(0.0)), file=results, flush=True)
    except UsageError as error:
        print(f"dry_run.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def dry_run(container, options: argparse.Namespace) -> list[str]:
    """The lines of the report.

    Args:
        container: Megatron's configuration of the job.
        options: of this tool.
    """
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args
    from megatron.training.training import initialize_megatron

    from megatron_xmoe.backend import verify_no_stock_layer

    args = get_args()
    initialize_megatron()
    model_config = container.model
    # of the usual hooks, one asks the other ranks for their hosts
    model_config.post_wrap_hooks = [verify_no_stock_layer] if args.moe_backend == "xmoe" else []
    groups = ProcessGroupCollection.use_mpu_process_groups()
    mine = built_without_values(model_config, groups)
    rank = rank_of(args, mine)
    limit = free_memory() if options.memory_limit is None else options.memory_limit * GIB
    states = state_bytes(args, rank)
    how = "tensors without values"
    if sum(states.values()) <= limit:
        how = f"real tensors: {measured(container, groups) / GIB:.2f} GiB before the first step"
    layout = layout_of(args)
    whole = in_one_piece(model_config)
    padding = (args.padded_vocab_size - args.xmoe_vocab_size) * args.hidden_size
    padding *= 2 if args.untie_embeddings_and_output_weights else 1
    memory = states | {"activations": sum(activation_bytes(args, rank))}
    torch.distributed.destroy_process_group()
    return [
        f"rank {options.rank} of {options.gpus}: {layout}; built with {how}",
        *table(counted(mine), counted(whole)),
        "memory of this rank in GiB, estimated: "
        + ", ".join(f"{name} {value / GIB:.2f}" for name, value in memory.items())
        + f"; together {sum(memory.values()) / GIB:.2f}",
        f"experts + attention: {counted(whole)['experts'] + counted(whole)['attention']}",
        f"vocabulary padding: {padding} ({args.xmoe_vocab_size} tokens padded to {args.padded_vocab_size})",
        f"parameters: {counted(whole).total() - padding}",
    ]


def built_without_values(model_config, groups) -> list:
    """The model chunks of a rank on torch's meta device, which has shapes only.

    Args:
        model_config: Megatron's GPTModelConfig; not changed.
        groups: process groups of the rank.
    """
    import torch
    from megatron.training.models import build_virtual_pipeline_stages

    model_config = copy.copy(model_config)
    transformer = copy.copy(model_config.transformer)
    # weights are then created on the default device, and nothing is drawn
    transformer.use_cpu_initialization, transformer.perform_initialization = True, False
    model_config.transformer = transformer
    builder = model_config.get_builder_cls()(model_config)
    with torch.device("meta"):
        chunks = build_virtual_pipeline_stages(
            builder.build_model, groups, transformer.virtual_pipeline_model_parallel_size
        )
    assert all(parameter.is_meta for chunk in chunks for parameter in chunk.parameters())
    for hook in model_config.post_wrap_hooks:
        hook(chunks)
    return chunks


def in_one_piece(model_config) -> list:
    """The whole model without values, in a job of one rank; ends the groups of the job before it."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    whole = copy.copy(model_config)
    whole.transformer = transformer = copy.copy(model_config.transformer)
    for name, value in IN_ONE_PIECE.items():
        setattr(transformer, name, value)
    return built_without_values(whole, ProcessGroupCollection.use_mpu_process_groups())


def measured(container, groups) -> int:
    """Bytes that the rank's model, gradients and optimizer take when they are built as a training run does it."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.training.training import setup_model_and_optimizer

    before = resident()
    built = setup_model_and_optimizer(ModelType.encoder_or_decoder, checkpointing_context={}, cfg_container=container,
                                      pg_collection=groups)  # fmt: skip
    after = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident() - before
    del built
    return after


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> float:
    """Bytes that a rank may take: what is free on the GPU, or a quarter of what is free on a machine without."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 / 4


def rank_of(args, chunks: list) -> Rank:
    """What the memory estimate needs to know of a rank's model chunks."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    expert = sum(p.numel() for p in parameters if not getattr(p, "allreduce", True))
    predicting = [layer for chunk in chunks if getattr(chunk, "mtp", None) for layer in chunk.mtp.layers]
    if args.mtp_use_repeated_layer:
        predicting *= args.mtp_num_layers or 0
    group = args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size
    passes, _, warm_up, _ = get_pp_rank_microbatches(get_num_microbatches(), len(chunks), group)
    return Rank(
        dense=sum(p.numel() for p in parameters) - expert,
        expert=expert,
        dense_replicas=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        expert_replicas=parallel_state.get_expert_data_parallel_world_size(),
        chunks=tuple(by_kind(chunk.decoder.layers) for chunk in chunks),
        predicting=by_kind([layer.mtp_model_layer for layer in predicting]),
        heads=chunks[-1].post_process * (1 + (args.mtp_num_layers or 0)),
        in_flight=min(passes, warm_up + 1) / len(chunks),
    )


def by_kind(layers) -> tuple[int, int]:
    """How many of a chunk's layers are without experts, and with."""
    with_experts = sum(getattr(layer, "is_moe_layer", False) for layer in layers)
    return len(layers) - with_experts, with_experts


def layout_of(args) -> str:
    """The sizes of the groups that the rank is in."""
    from megatron.core import parallel_state as groups

    return (
        f"tensor {args.tensor_model_parallel_size}, pipeline {args.pipeline_model_parallel_size}, "
        f"context {args.context_parallel_size}, data {groups.get_data_parallel_world_size()}; experts over "
        f"{groups.get_expert_model_parallel_world_size()} ranks, "
        f"{groups.get_expert_data_parallel_world_size()} replica(s)"
    )


def counted(chunks: list) -> Counter:
    """Number of parameters of each part of a model."""
    counts: Counter = Counter()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            counts[next(part for part, text in PARTS.items() if text in name)] += parameter.numel()
    return counts


def table(mine: Counter, whole: Counter) -> list[str]:
    """Both counts side by side, a line for each part."""
    rows = [(part, mine[part], whole[part]) for part in PARTS if whole[part]]
    rows.append(("together", mine.total(), whole.total()))
    return [f"{'parameters':16}{'this rank':>20}{'whole model':>22}",
            *(f"{part:16}{ours:>20,}{all_:>22,}" for part, ours, all_ in rows)]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
