"""Checks of the command line and the checkpoint, made on every rank before any of them can wait for another.

Each raises UsageError with the value, the rule and the fix. Megatron's own assertions come later, some of them on one
rank only while the others wait in a collective.
"""

import argparse
import warnings
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_xmoe.parallel_state import parse_ranks_per_node
from megatron_xmoe.training.errors import UsageError, one_line


def check_arguments(args: argparse.Namespace) -> None:
    """What the numbers on the command line must satisfy, in the order a user would think of them.

    Raises:
        UsageError: the first rule that does not hold.
    """
    if args.moe_backend == "xmoe" and not args.num_experts:
        raise UsageError(
            "--moe-backend xmoe for a model without experts. Fix: add --num-experts N, or leave --moe-backend out"
        )
    if args.xmoe_ep_placement != "ep-first":
        _check_placement(args)
    if args.xmoe_qk_norm != "per-head" and (not args.qk_layernorm or args.multi_latent_attention):
        raise UsageError(
            f"--xmoe-qk-norm {args.xmoe_qk_norm} says what --qk-layernorm normalises, outside latent attention. Fix: "
            "add --qk-layernorm, or leave it out"
        )
    if args.xmoe_group_score != "sum" and not args.moe_router_group_topk:
        raise UsageError(
            f"--xmoe-group-score {args.xmoe_group_score} ranks groups of experts, and there are none. Fix: add "
            "--moe-router-num-groups and --moe-router-group-topk, or leave it out"
        )
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"):
        value = getattr(args, name)
        if value is None or value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be a positive number. Fix: give it")
    _check_shape(args)
    if args.tokenizer_type is None:
        raise UsageError(
            "--tokenizer-type is missing. Fix: give the tokenizer of the data, or NullTokenizer with --vocab-size for "
            "--mock-data"
        )
    _divides("tensor x pipeline x context parallel size", _model_size(args), "the number of processes",
             args.world_size, "change --nproc-per-node or the parallel sizes")  # fmt: skip
    if args.num_experts:
        _check_experts(args)
    _divides("--tensor-model-parallel-size", args.tensor_model_parallel_size, "--num-attention-heads",
             args.num_attention_heads, "change one of them")  # fmt: skip
    data_parallel = args.world_size // _model_size(args)
    if args.global_batch_size is not None and args.global_batch_size < 1:
        raise UsageError(f"--global-batch-size is {args.global_batch_size}; it must be positive. Fix: give it")
    if args.global_batch_size is not None:
        _divides("--micro-batch-size x data-parallel size", args.micro_batch_size * data_parallel,
                 "--global-batch-size", args.global_batch_size, "change one of them")  # fmt: skip
    if args.sequence_parallel:
        _divides("--tensor-model-parallel-size", args.tensor_model_parallel_size, "--seq-length", args.seq_length,
                 "change one of them")  # fmt: skip


def _check_placement(args: argparse.Namespace) -> None:
    reason = None
    if not args.num_experts:
        reason = "places replicas of experts, and the model has none. Fix: add --num-experts N, or leave it out"
    elif args.use_tp_pp_dp_mapping and args.pipeline_model_parallel_size > 1:
        reason = (
            "puts replicas of an expert on neighbouring ranks; --use-tp-pp-dp-mapping puts a pipeline stage between "
            "them. Fix: leave one of them out"
        )
    elif args.create_all_gather_group:
        reason = (
            "orders ranks as the groups of --create-all-gather-group do not. Fix: leave one of them out"
        )
    if reason:
        raise UsageError(f"--xmoe-ep-placement {args.xmoe_ep_placement} {reason}")


def _check_shape(args: argparse.Namespace) -> None:
    if args.kv_channels is None:
        _divides("--num-attention-heads", args.num_attention_heads, "--hidden-size", args.hidden_size,
                 "change one of them, or give --kv-channels")  # fmt: skip
    if args.group_query_attention:
        _divides("--num-query-groups", args.num_query_groups, "--num-attention-heads", args.num_attention_heads,
                 "change one of them")  # fmt: skip
    pattern = args.moe_layer_freq
    if args.num_experts and isinstance(pattern, list) and len(pattern) != args.num_layers:
        raise UsageError(
            f"--moe-layer-freq has {len(pattern)} entries; it must have one for each of --num-layers, "
            f"{args.num_layers}. Fix: change one of them"
        )
    if args.moe_backend == "xmoe" and isinstance(pattern, list) and not any(pattern):
        raise UsageError(
            f"--moe-layer-freq {pattern} makes every layer dense; --moe-backend xmoe needs one with experts. "
            "Fix: put a 1 in it"
        )
    uneven = (args.pipeline_model_parallel_layout, args.decoder_first_pipeline_num_layers,
              args.decoder_last_pipeline_num_layers)  # fmt: skip
    embedding_counts = args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split
    if not any(uneven) and not embedding_counts:
        stages = args.pipeline_model_parallel_size * (args.num_virtual_stages_per_pipeline_rank or 1)
        _divides("the number of pipeline stages", stages, "--num-layers", args.num_layers,
                 "change one of them, or give --pipeline-model-parallel-layout")  # fmt: skip


def _model_size(args: argparse.Namespace) -> int:
    return args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size


def _check_experts(args: argparse.Namespace) -> None:
    experts, topk = args.num_experts, args.moe_router_topk
    if experts < 1:
        raise UsageError(f"--num-experts is {experts}; it must be positive. Fix: give a positive number")
    if not 1 <= topk <= experts:
        raise UsageError(
            f"--moe-router-topk is {topk}; it must be between 1 and --num-experts, {experts}. Fix: change one of them"
        )
    _divides("--expert-model-parallel-size", args.expert_model_parallel_size, "--num-experts", experts,
             "change one of them")  # fmt: skip
    expert_tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    size = args.expert_model_parallel_size * expert_tensor * args.pipeline_model_parallel_size
    _divides("expert x expert-tensor x pipeline parallel size", size, "the number of processes", args.world_size,
             "change --nproc-per-node or the parallel sizes")  # fmt: skip
    if args.xmoe_ranks_per_node is not None:
        try:
            parse_ranks_per_node(args.xmoe_ranks_per_node, args.world_size)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _divides(divisor_name: str, divisor: int, name: str, value: int, fix: str) -> None:
    if divisor < 1 or value % divisor:
        raise UsageError(f"{name}, {value}, is not divisible by {divisor_name}, {divisor}. Fix: {fix}")


def check_checkpoint(args: argparse.Namespace, vocab_size: int | None) -> None:
    """The checkpoint to load exists where one is demanded, can be read, and has this run's vocabulary and shape.

    Megatron resizes embeddings silently when the vocabulary differs.

    Raises:
        UsageError: value, rule and fix.
    """
    for option in ("pretrained_checkpoint", "load"):
        directory = getattr(args, option)
        if directory is not None and "://" not in directory:
            _check_one_checkpoint(args, f"--{option.replace('_', '-')}", Path(directory), vocab_size)


def _check_one_checkpoint(args: argparse.Namespace, option: str, directory: Path, vocab_size: int | None) -> None:
    tracker = directory / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        if args.exit_on_missing_checkpoint or option == "--pretrained-checkpoint":
            raise UsageError(f"{option} {directory} holds no checkpoint ({tracker.name} is missing). Fix: check it")
        return  # Megatron starts from random weights and says so
    step = tracker.read_text().strip()
    if args.ckpt_step is not None:
        step = str(args.ckpt_step)
    name = step if step == "release" else f"iter_{int(step):07d}" if step.isdigit() else None
    if name is None or not (directory / name).is_dir():
        raise UsageError(
            f"{option} {directory}: {tracker.name} or --ckpt-step names '{step}', and there is no such checkpoint. "
            "Fix: put the directory back, or choose an iteration with --ckpt-step"
        )
    saved = _saved_arguments(option, directory / name)
    if saved is not None and not args.moe_use_upcycling:
        _compare(args, saved, f"{option} {directory / name}", vocab_size)


def _saved_arguments(option: str, directory: Path) -> argparse.Namespace | None:
    """The arguments that a torch_dist checkpoint was saved with; None for other formats."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch notes that no process group exists yet
            return dist_checkpointing.load_common_state_dict(str(directory)).get("args")
    except Exception as error:  # torch, pickle and the file system fail in many ways on a damaged file
        raise UsageError(
            f"{option} {directory} cannot be read ({one_line(error)}). Fix: use another checkpoint (--ckpt-step)"
        ) from error


def _compare(args: argparse.Namespace, saved: argparse.Namespace, where: str, vocab_size: int | None) -> None:
    names = ["num_layers", "hidden_size", "num_attention_heads", "num_experts", "add_bias_linear"]
    if args.num_experts:
        names.append("moe_ffn_hidden_size")
    differences = [
        (name, getattr(saved, name), getattr(args, name))
        for name in names
        if hasattr(saved, name) and getattr(saved, name) != getattr(args, name)
    ]
    if vocab_size is not None:
        differences[:0] = _vocabulary_difference(saved, vocab_size)
    if differences:
        name, before, now = differences[0]
        raise UsageError(
            f"{where} has {name} {before}, this run has {now}. Fix: use the checkpoint's value (the tokenizer decides "
            "the vocabulary, --disable-bias-linear the biases), or another checkpoint"
        )


def _vocabulary_difference(saved: argparse.Namespace, vocab_size: int) -> list[tuple[str, int, int]]:
    """Exact where our entry noted the vocabulary; for stock checkpoints by the padded size it leads to."""
    noted = getattr(saved, "xmoe_vocab_size", None)
    if noted is not None:
        return [("vocabulary", noted, vocab_size)] if noted != vocab_size else []
    padded = getattr(saved, "padded_vocab_size", None)
    padding = (getattr(saved, "make_vocab_size_divisible_by", None), getattr(saved, "tensor_model_parallel_size", None))
    if None in (padded, *padding):  # a converter wrote only some of the arguments
        return []
    would_be = calculate_padded_vocab_size(vocab_size, *padding, logging_enabled=False)
    return [("padded vocabulary", padded, would_be)] if would_be != padded else []
