"""X-MoE in Megatron-LM's own pretrain_gpt.py: what the lines call that patches/patch_megatron.py inserts there."""

import os
import sys
from collections.abc import Callable

from megatron.training import get_args

from megatron_xmoe.platform import cpu, wheel
from megatron_xmoe.training.arguments import add_xmoe_arguments, parse_with
from megatron_xmoe.training.errors import UsageError
from megatron_xmoe.training.options import check_options
from megatron_xmoe.training.setup import settle, use_backend


def with_xmoe_options(stock_parse: Callable) -> Callable:
    """Megatron's `parse_and_validate_args`, which knows X-MoE's options as well.

    Without `--moe-backend xmoe` the stock function does everything, and X-MoE's other options are refused. With it the
    options that X-MoE demands are set and what it does not serve is refused, between parsing and Megatron's validation.

    Args:
        stock_parse: megatron.training.arguments.parse_and_validate_args.
    """

    def parse_and_validate_args(
        extra_args_provider: Callable | None = None,
        ignore_unknown_args: bool = False,
        args_defaults: dict[str, object] | None = None,
    ):
        def provider(parser):
            return add_xmoe_arguments(extra_args_provider(parser) if extra_args_provider else parser)

        args, given, defaults = parse_with(provider, ignore_unknown_args)
        ours = getattr(args, "moe_backend", None)  # a YAML file replaces all arguments
        try:
            if ours == "megatron":
                check_options(args, defaults, script=None)
            if ours != "xmoe":
                return stock_parse(provider, ignore_unknown_args, args_defaults or {})
            for name, value in (args_defaults or {}).items():
                if getattr(args, name) is None:
                    setattr(args, name, value)
            wheel.install()
            adjustments = settle(args, given, defaults, on_cpu=cpu.needed(), script=None)
        except UsageError as error:
            print(f"{sys.argv[0]}: error (rank {os.environ.get('RANK', '0')}): {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        args = get_args()
        args.xmoe_adjustments = adjustments
        return args

    return parse_and_validate_args


def use_moe_backend(model_config) -> None:
    """Make Megatron build the model of a GPTModelConfig with X-MoE's layers, if `--moe-backend xmoe` was given."""
    args = get_args()
    if getattr(args, "moe_backend", "megatron") == "xmoe":
        stand_ins = len(cpu.TORCH_REPLACEMENTS + cpu.MEGATRON_REPLACEMENTS) if cpu.needed() else 0
        use_backend(model_config, args.xmoe_adjustments, stand_ins, len(wheel.REPLACEMENTS))
