"""Refuses, by name and at start-up, the options that are not served. The tables are in option_table.py."""

import argparse

from megatron_xmoe.training.errors import UsageError
from megatron_xmoe.training.option_table import (
    LIMITED,
    REFUSED,
    SPELLINGS,
    UNAVAILABLE,
    Refusal,
    sequence_mode,
    spelling,
)

SCRIPT = "pretrain_xmoe.py"
OF_OUR_LAYER = frozenset(
    """
    xmoe_min_capacity xmoe_combine_weights xmoe_group_score xmoe_ranks_per_node
    xmoe_dispatcher xmoe_pilot xmoe_rbd_overlap xmoe_guard_empty_alltoall
    xmoe_sequence_shard xmoe_shared_expert
    xmoe_grouped_gemm xmoe_recompute_activation xmoe_gradient_accumulation_fusion xmoe_router_fusion xmoe_rope_fusion
    xmoe_metrics xmoe_profile_breakdown
    """.split()
)


def check_options(args: argparse.Namespace, defaults: dict[str, object], script: str | None = SCRIPT) -> None:
    """Refuse what is not served.

    Args:
        args: parsed and adjusted arguments, not yet validated by Megatron; those that --use-checkpoint-args took from
            a checkpoint count as well.
        defaults: destination -> default of every option.
        script: the script of ours whose own limits count; None for a stock script, which has its own.

    Raises:
        UsageError: the first option that is not served, the reason, and the way out.
    """
    changed = [name for name in sorted(defaults) if getattr(args, name, defaults[name]) != defaults[name]]
    for name in changed:
        if script and name in UNAVAILABLE:
            _refuse(name, args, UNAVAILABLE[name], script)
    if args.moe_backend != "xmoe":
        of_ours = OF_OUR_LAYER if script else {name for name in changed if name.startswith("xmoe_")}
        for name in sorted(of_ours.intersection(changed)):
            refusal = Refusal("it is an option of X-MoE's", "add --moe-backend xmoe, or leave it out")
            _refuse(name, args, refusal, "--moe-backend megatron")
        return
    for name in changed:
        if name in REFUSED:
            _refuse(name, args, REFUSED[name], "--moe-backend xmoe")
    for name, limit in LIMITED.items():
        if not limit.served(args):
            _refuse(name, args, Refusal(limit.rule, limit.way_out), "--moe-backend xmoe")
    _check_capacity(args)
    _check_bypassing(args, defaults)
    _check_shared_experts(args)
    if args.moe_input_jitter_eps and args.xmoe_combine_weights == "logits":
        refusal = Refusal("the logits are computed once more, without the jitter", "leave one of them out")
        _refuse("moe_input_jitter_eps", args, refusal, "--xmoe-combine-weights logits")
    if args.moe_enable_routing_replay and args.xmoe_group_score != "sum":
        refusal = Refusal("replayed routes leave nothing to score", "leave one of them out")
        _refuse("moe_enable_routing_replay", args, refusal, f"--xmoe-group-score {args.xmoe_group_score}")


def _check_capacity(args: argparse.Namespace) -> None:
    if args.xmoe_min_capacity < 0:
        refusal = Refusal("a capacity is a number of routes", "give 0 or more")
        _refuse("xmoe_min_capacity", args, refusal, "--moe-backend xmoe")
    if args.moe_expert_capacity_factor is None:
        for name, default in (("xmoe_min_capacity", 0), ("moe_token_drop_policy", "probs")):
            if getattr(args, name) != default:
                refusal = Refusal("nothing is dropped without a capacity", "add --moe-expert-capacity-factor C")
                _refuse(name, args, refusal, "--moe-backend xmoe")


def _check_bypassing(args: argparse.Namespace, defaults: dict[str, object]) -> None:
    if args.xmoe_dispatcher == "alltoall":
        for name in ("xmoe_pilot", "xmoe_rbd_overlap"):
            if getattr(args, name) != defaults[name]:
                refusal = Refusal("it is rbd's", "leave it out, or use --xmoe-dispatcher rbd or auto")
                _refuse(name, args, refusal, "--xmoe-dispatcher alltoall")


def _check_shared_experts(args: argparse.Namespace) -> None:
    if args.xmoe_shared_expert != "sequence":
        return
    if not args.moe_shared_expert_intermediate_size:
        refusal = Refusal("the model has no shared experts", "add --moe-shared-expert-intermediate-size")
    elif args.tensor_model_parallel_size == 1:
        return  # the same thing
    elif args.expert_tensor_parallel_size != 1:
        refusal = Refusal("experts are sharded over ranks", "add --expert-tensor-parallel-size 1, or use 'tensor'")
    elif sequence_mode(args) == "duplicated":
        refusal = Refusal("each rank computes the whole sequence", "use --xmoe-sequence-shard on, or 'tensor'")
    else:
        return
    _refuse("xmoe_shared_expert", args, refusal, "--moe-backend xmoe")


def _refuse(name: str, args: argparse.Namespace, refusal: Refusal, who: str) -> None:
    value, option = getattr(args, name), spelling(name)
    if value is False and name not in SPELLINGS:
        what = f"does not run without {option}"
    else:
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        what = f"does not take {option}" if isinstance(value, bool) else f"does not take {option} {shown}"
    raise UsageError(f"{who} {what}: {refusal.reason}. Fix: {refusal.way_out}")
