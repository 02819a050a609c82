"""What an entry script does with a command line: settle the arguments, then put the backend into the model's config."""

import argparse
import inspect

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training import get_args, get_tokenizer
from megatron.training.arguments import validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables
from megatron.training.models.gpt import default_layer_spec

from megatron_xmoe.backend import apply_moe_backend
from megatron_xmoe.metrics import install_metrics
from megatron_xmoe.platform import multi_tensor, placement, rotary
from megatron_xmoe.training import checks
from megatron_xmoe.training.arguments import xmoe_config_from_args
from megatron_xmoe.training.defaults import adjust
from megatron_xmoe.training.options import SCRIPT, check_options
from megatron_xmoe.training.report import print_report
from megatron_xmoe.training.rotary import rotary_embedding


def settle(
    args: argparse.Namespace, given: set[str], defaults: dict[str, object], on_cpu: bool, script: str | None = SCRIPT
) -> list[str]:
    """Adjust, check and validate parsed arguments, and make them Megatron's global ones.

    Args:
        args, given, defaults: what `arguments.parse` returns.
        on_cpu: whether the run is on a CPU.
        script: the script of ours whose own limits count; None for a stock script.

    Returns:
        A line for each option that was set here.

    Raises:
        UsageError: something of the user's that cannot work.
    """
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
    adjustments = adjust(args, given, on_cpu)
    checks.check_arguments(args)
    check_options(args, defaults, script)
    validate_args(args)
    set_global_variables(args)
    args = get_args()
    args.xmoe_vocab_size = getattr(get_tokenizer(), "vocab_size", None)  # checkpoints keep it, for check_checkpoint
    checks.check_checkpoint(args, args.xmoe_vocab_size)
    return adjustments


def use_backend(model_config, adjustments: list[str], stand_ins: int, repairs: int) -> None:
    """Put the backend of the settled arguments into Megatron's GPTModelConfig, with the hook that reports it.

    Args:
        model_config: not yet used to build a model; changed in place.
        adjustments: what `settle` returned.
        stand_ins, repairs: numbers of symbols replaced for a CPU, and everywhere, for the start-up block.
    """
    args = get_args()
    xmoe = xmoe_config_from_args(args)
    if xmoe.xmoe_ep_placement == "dp-first":
        placement.install_dp_first()
    apply_moe_backend(model_config, xmoe, _stock_spec(model_config.transformer_layer_spec))
    if args.moe_backend == "xmoe":
        repairs += len(multi_tensor.install())
    if rotary_embedding(args).ours:
        rotary.install()

    def report(model_chunks):
        print_report(xmoe, adjustments, stand_ins, repairs)
        if xmoe.moe_backend == "xmoe":
            install_metrics(
                *(xmoe.xmoe_metrics, xmoe.xmoe_profile_breakdown),
                *(args.num_layers + (args.mtp_num_layers or 0), args.num_experts, args.log_interval),
            )
        return model_chunks

    model_config.post_wrap_hooks.append(report)


def _stock_spec(chosen):
    """The spec callable that Megatron would use: --spec's, or its own choice."""

    def stock_spec(config, vp_stage):
        if chosen is None:
            return default_layer_spec(config, vp_stage)
        if isinstance(chosen, ModuleSpec) or not callable(chosen):  # a ModuleSpec is callable, but builds a module
            return chosen
        if "vp_stage" in inspect.signature(chosen).parameters:
            return chosen(config, vp_stage=vp_stage)
        return chosen(config)

    return stock_spec
