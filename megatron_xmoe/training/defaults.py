"""Options that this machine or the X-MoE backend demands, set here and reported instead of demanded from the user.

A value that the user gave is never overruled silently: where it cannot work, the run stops with the reason.
"""

import argparse
import os
from dataclasses import dataclass, field

from megatron.core.transformer.enums import AttnBackend

from megatron_xmoe import _optional
from megatron_xmoe.router import why_not_fused
from megatron_xmoe.training.arguments import xmoe_config_from_args
from megatron_xmoe.training.errors import UsageError

EVAL_INTERVAL = 1000


@dataclass
class Adjustments:
    """Collects what was changed in the arguments, for the start-up report."""

    args: argparse.Namespace
    given: set[str]
    lines: list[str] = field(default_factory=list)

    def set(self, name: str, value, option: str, why: str) -> None:
        """Set an argument to `value`, which the command line spells `option`; refuse if the user chose another.

        Raises:
            UsageError: the user gave another value.
        """
        current = getattr(self.args, name)
        if current == value:
            return
        if name in self.given:
            raise UsageError(f"--{name.replace('_', '-')} {current} cannot be used here: {why}. Use {option}")
        setattr(self.args, name, value)
        self.lines.append(f"{option}  ({why})")

    def switch_off(self, name: str, option: str, why: str) -> None:
        """Switch a fusion off; Megatron's fusions are on unless the user says otherwise."""
        if getattr(self.args, name):
            setattr(self.args, name, False)
            self.lines.append(f"{option}  ({why})")


def adjust(args: argparse.Namespace, given: set[str], on_cpu: bool) -> list[str]:
    """Set what the environment demands in parsed, not yet validated arguments.

    Returns:
        One line per change: the option and the reason.

    Raises:
        UsageError: the user asked for something that cannot work here.
    """
    changes = Adjustments(args, given)
    if not _optional.transformer_engine().usable:
        _without_transformer_engine(changes)
    if on_cpu:
        _on_cpu(changes)
    else:
        _on_gpu(changes)
    if args.num_experts:
        _for_experts(changes)
    _for_the_loop(changes)
    if args.moe_backend == "xmoe" and not args.add_bias_linear and args.hidden_dropout == 0:
        why = "no biases and no dropout: one addition is left, and calling what was compiled costs more"
        changes.switch_off("bias_dropout_fusion", "--no-bias-dropout-fusion", why)
    return changes.lines


def _without_transformer_engine(changes: Adjustments) -> None:
    args, why = changes.args, f"Transformer Engine: {_optional.transformer_engine().reason}"
    changes.set("transformer_impl", "local", "--transformer-impl local", why)
    if args.context_parallel_size > 1:
        raise UsageError(
            f"--context-parallel-size {args.context_parallel_size} needs Transformer Engine ({why}): install it or "
            "use 1"
        )
    if args.attention_backend == AttnBackend.fused:
        raise UsageError(f"--attention-backend fused needs Transformer Engine ({why}): use auto, flash or unfused")
    args.apply_rope_fusion = False  # it means Transformer Engine's function; the start-up block's line is `rotary`
    if _optional.apex_layer_norm().usable:
        return
    why += f", Apex: {_optional.apex_layer_norm().reason}"
    changes.switch_off("gradient_accumulation_fusion", "--no-gradient-accumulation-fusion", why)
    changes.switch_off("masked_softmax_fusion", "--no-masked-softmax-fusion", why)
    if not args.no_persist_layer_norm:
        args.no_persist_layer_norm = True
        changes.lines.append(f"--no-persist-layer-norm  ({why})")
    if args.use_distributed_optimizer and args.ckpt_format == "torch_dist":
        changes.set(
            "dist_ckpt_optim_fully_reshardable",
            True,
            "--dist-ckpt-optim-fully-reshardable",
            "so that optimizer states move to another number of ranks",
        )


def _on_cpu(changes: Adjustments) -> None:
    why = "no accelerator"
    changes.set("distributed_backend", "gloo", "--distributed-backend gloo", why)
    for name, option in (
        ("bias_swiglu_fusion", "--no-bias-swiglu-fusion"),
        ("bias_gelu_fusion", "--no-bias-gelu-fusion"),
        ("bias_dropout_fusion", "--no-bias-dropout-fusion"),
    ):
        changes.switch_off(name, option, f"{why} to compile it for")


def _on_gpu(changes: Adjustments) -> None:
    args = changes.args
    if args.use_cpu_initialization:
        raise UsageError(
            "--use-cpu-initialization leaves the model on the CPU in Megatron-Core 0.19: leave the option out"
        )
    if args.tensor_model_parallel_size > 1 and not (args.use_torch_fsdp2 or args.use_megatron_fsdp):
        connections = os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        changes.lines.append(f"CUDA_DEVICE_MAX_CONNECTIONS={connections}  (tensor parallelism needs 1)")
    fuses = args.num_experts and args.moe_backend == "xmoe"
    if fuses and not why_not_fused(args, args.num_experts, xmoe_config_from_args(args)):
        changes.set(
            "moe_router_fusion",
            True,
            "--moe-router-fusion",
            "X-MoE's kernels; the host takes longer to launch Megatron's many small ones than the GPU to run them",
        )


def _for_experts(changes: Adjustments) -> None:
    args, given = changes.args, changes.given
    if "moe_token_dispatcher_type" not in given:
        changes.set(
            "moe_token_dispatcher_type",
            "alltoall",
            "--moe-token-dispatcher-type alltoall",
            "Megatron's default, allgather, sends every token to every rank",
        )
    shards_by_default = args.tensor_model_parallel_size > 1 and args.expert_tensor_parallel_size is None
    if args.moe_backend == "xmoe" and shards_by_default:
        changes.set(
            "expert_tensor_parallel_size",
            1,
            "--expert-tensor-parallel-size 1",
            "X-MoE keeps experts whole; Megatron's default is the tensor-parallel size",
        )
    why = _why_no_biases(args)
    if why:
        changes.set("add_bias_linear", False, "--disable-bias-linear", why)
    if args.moe_backend == "xmoe" and args.xmoe_gradient_accumulation_fusion == "auto":
        # Megatron's own switch is about Apex, which X-MoE's experts do without: stock commands must switch it off
        args.xmoe_gradient_accumulation_fusion = "on"


def _why_no_biases(args: argparse.Namespace) -> str:
    """Why experts cannot have biases, or ''."""
    if args.moe_backend != "xmoe":
        local = args.transformer_impl == "local"
        return "experts with biases do not train without Transformer Engine's grouped experts" if local else ""
    if args.moe_shared_expert_intermediate_size:
        return "Megatron's shared experts have no biases"
    return "experts that ranks share have no biases" if (args.expert_tensor_parallel_size or 1) > 1 else ""


def _for_the_loop(changes: Adjustments) -> None:
    args = changes.args
    if args.eval_interval is None:
        changes.set(
            "eval_interval",
            EVAL_INTERVAL,
            f"--eval-interval {EVAL_INTERVAL}",
            "Megatron 0.19 fails without a value",
        )
    if args.create_attention_mask_in_dataloader and not args.reset_attention_mask:
        changes.set(
            "create_attention_mask_in_dataloader",
            False,
            "--no-create-attention-mask-in-dataloader",
            "the mask is plainly causal, which the attention kernels do by themselves",
        )
