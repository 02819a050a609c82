"""Stands in for Megatron-LM's pretrain_gpt.py: the statements that the patch looks for, around our data and loss."""

from collections import Counter

from megatron.core.enums import ModelType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_xmoe.training.gpt_step import datasets_provider, forward_step


def add_own_options(parser):
    """What the script adds to the command line by itself."""
    parser.add_argument("--of-the-script", default="nothing")
    return parser


def show_layers(model_chunks):
    """Print which Mixture-of-Experts layers were built."""
    layers = [type(module) for chunk in model_chunks for module in chunk.modules() if isinstance(module, MoELayer)]
    print("layers:", dict(Counter(layer.__name__ for layer in layers)))
    return model_chunks


if __name__ == "__main__":
    args = parse_and_validate_args(
        extra_args_provider=add_own_options,
        args_defaults={"tokenizer_type": "NullTokenizer"},
    )
    print("of the script:", args.of_the_script)
    model_cfg = gpt_config_from_args(args)
    model_cfg.post_wrap_hooks.append(show_layers)
    full_config = pretrain_cfg_container_from_args(args, model_cfg)
    pretrain(full_config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
