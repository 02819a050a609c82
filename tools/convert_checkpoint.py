"""Converts checkpoints: HuggingFace <-> Megatron/X-MoE <- the original X-MoE, counted to the last tensor.

Nothing is written under its final name before it is complete, and nothing is replaced. A tensor that no rule matches,
or that is missing, ends the conversion with exit code 2 and its name.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]  # works without an installation, too

from command_line import OneLineErrorParser, UserError, positive_number, run_tool  # noqa: E402

PROG = "convert_checkpoint.py"
DIFFERENCES_SHOWN = 50


def hf_to_megatron(args: argparse.Namespace) -> None:
    """HuggingFace -> Megatron."""
    from megatron_xmoe.checkpoint.convert import hf_to_megatron as convert

    print(convert(args.hf, args.megatron, options(args)).table())
    if not args.dry_run:
        print(f"  pretrain_xmoe.py $(cat {args.megatron}/megatron_args.txt) --load {args.megatron} ...")


def megatron_to_hf(args: argparse.Namespace) -> None:
    """Megatron -> HuggingFace."""
    from megatron_xmoe.checkpoint.convert import megatron_to_hf as convert

    print(convert(args.megatron, args.hf, options(args), args.hf_config).table())


def xmoe_to_megatron(args: argparse.Namespace) -> None:
    """The original X-MoE or DeepSpeed-MoE -> Megatron."""
    from megatron_xmoe.checkpoint.xmoe_convert import xmoe_to_megatron as convert

    known = {"heads": args.num_attention_heads, "topk": args.topk}
    print(convert(args.xmoe, args.megatron, options(args), args.trust_pickle, **known).table())


def upcycle(args: argparse.Namespace) -> None:
    """A dense checkpoint (HuggingFace or Megatron) -> Megatron with experts that start from its weights."""
    from megatron_xmoe.checkpoint.upcycle import Experts
    from megatron_xmoe.checkpoint.upcycle import upcycle as convert

    experts = Experts(args.num_experts, args.granularity, args.topk, args.pre_softmax, args.seed)
    print(convert(args.dense, args.megatron, experts, options(args)).table())


def inspect(args: argparse.Namespace) -> None:
    """What a checkpoint holds."""
    from megatron_xmoe.checkpoint.compare import describe

    print(describe(args.checkpoint, args.tensors))


def diff(args: argparse.Namespace) -> int:
    """In what two checkpoints differ: exit code 0 if in nothing, 1 if in something."""
    from megatron_xmoe.checkpoint.compare import differences, open_both

    first, second = open_both(args.first, args.second)
    count = 0
    for count, line in enumerate(differences(first, second), 1):
        if count <= DIFFERENCES_SHOWN:
            print(line)
    if count > DIFFERENCES_SHOWN:
        print(f"... and {count - DIFFERENCES_SHOWN} more")
    print(f"{len(first.names())} and {len(second.names())} tensors, {count} differ")
    return 1 if count else 0


def logits(args: argparse.Namespace) -> None:
    """A model's logits for some tokens, computed by the model that pretrain_xmoe.py builds, in this process."""
    import torch

    from megatron_xmoe.checkpoint.convert import checkpoint_arguments
    from megatron_xmoe.training.errors import is_users, one_line
    from megatron_xmoe.training.logits import logits_of, with_model

    if args.out.exists():
        raise UserError(f"{args.out} exists. Fix: choose another name, or remove it first")
    if not args.out.resolve().parent.is_dir():
        raise UserError(f"{args.out.resolve().parent} is not a folder: the output goes there. Fix: make it first")
    tokens = load_tokens(args.tokens)
    words, vocabulary = checkpoint_arguments(args.megatron)
    if int(tokens.max()) >= vocabulary:
        raise UserError(f"{args.tokens} has token {int(tokens.max())}; the vocabulary has {vocabulary}")
    length = str(tokens.shape[1])
    words += ["--seq-length", length, *args.arguments]
    try:
        result = with_model(words, args.megatron, vocabulary, lambda model: logits_of(model, tokens))
    except Exception as error:
        if is_users(error, before_training=True):
            raise UserError(one_line(error)) from error
        raise
    temporary = args.out.with_name(f".{args.out.name}.unfinished")
    try:
        torch.save(result[..., :vocabulary].contiguous(), temporary)
        temporary.rename(args.out)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{args.out}: logits {list(result[..., :vocabulary].shape)}, float32")


def load_tokens(path: Path):
    """Integer tokens [B, S] from a file of torch.save."""
    import torch

    try:
        tokens = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and pickle fail in many ways
        raise UserError(f"{path} is no tensor saved with torch.save ({str(error).splitlines()[0]})") from error
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
        raise UserError(f"{path} must hold one integer tensor [batch, sequence]")
    if int(tokens.min()) < 0:
        raise UserError(f"{path} has token {int(tokens.min())}; tokens are not negative")
    return tokens.long()


def options(args: argparse.Namespace):
    """How to convert."""
    from megatron_xmoe.checkpoint.convert import DTYPES, Options

    return Options(
        dtype=DTYPES[args.dtype] if args.dtype else None,
        implementation=getattr(args, "transformer_impl", "local"),
        verify=args.verify,
        dry_run=args.dry_run,
        shard_bytes=int(getattr(args, "shard_size", 5) * 1e9),
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    example = "Example: python tools/convert_checkpoint.py hf-to-megatron --hf Qwen3-30B-A3B --megatron qwen3 --verify"
    main = OneLineErrorParser(prog=PROG, description=__doc__, epilog=f"COMMAND --help lists its options. {example}",
                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = main.add_subparsers(required=True, metavar="COMMAND", parser_class=OneLineErrorParser)

    def command(name: str, function, **folders: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(function=function)
        group = added.add_argument_group("checkpoints")
        for folder, text in folders.items():
            group.add_argument(f"--{folder}", required=True, type=Path, metavar="DIR", help=text)
        return added

    new = "output; must not exist, or be empty"
    convert = command("hf-to-megatron", hf_to_megatron, hf="checkpoint with safetensors shards", megatron=new)
    _conversion_options(convert, to_megatron=True)
    convert = command("megatron-to-hf", megatron_to_hf, megatron="torch_dist checkpoint of any layout", hf=new)
    add = _conversion_options(convert, to_megatron=False).add_argument
    text = "config.json or its folder (default: hf/ of a conversion)"
    add("--hf-config", type=Path, metavar="DIR|FILE", help=text)
    add("--shard-size", type=positive_number(float), default=5, metavar="GB", help="size of the shards (default: 5)")
    convert = command("xmoe-to-megatron", xmoe_to_megatron, xmoe="folder with mp_rank and expert files", megatron=new)
    _conversion_options(convert, to_megatron=True)
    add = convert.add_argument_group("how the source is read").add_argument
    trust = "load pickles that need more than tensors: they may run code of whoever made the file"
    add("--trust-pickle", action="store_true", help=trust)
    known = "(default: what the checkpoint was trained with)"
    add("--num-attention-heads", type=positive_number(int), metavar="N", help=f"heads {known}")
    add("--topk", type=positive_number(int), metavar="K", help=f"experts per token {known}")
    convert = command("upcycle", upcycle, dense="dense checkpoint", megatron=new)
    _conversion_options(convert, to_megatron=True)
    add = convert.add_argument_group("experts").add_argument
    number = {"type": positive_number(int), "metavar": "N"}
    add("--num-experts", required=True, **number, help="experts, a multiple of --granularity")
    add("--topk", required=True, **number, help="experts per token")
    add("--granularity", default=1, **number, help="experts cut from one copy of a layer (default: 1)")
    add("--pre-softmax", action="store_true", help="route by the softmax over all experts")
    add("--seed", type=int, default=1234, help="of the new routers (default: 1234)")
    look = command("inspect", inspect)
    look.add_argument("checkpoint", type=Path, metavar="DIR", help="in any of the formats")
    look.add_argument("--tensors", action="store_true", help="list every tensor")
    compare = command("diff", diff)
    compare.add_argument("first", type=Path, metavar="DIR", help="a checkpoint, in any of the formats")
    compare.add_argument("second", type=Path, metavar="DIR", help="another one, in the same format or not")
    run = command("logits", logits, megatron="torch_dist checkpoint")
    add = run.add_argument_group("tokens and logits").add_argument
    add("--tokens", required=True, type=Path, metavar="FILE.pt", help="integer tensor [batch, sequence]")
    add("--out", required=True, type=Path, metavar="FILE.pt", help="float32 tensor [batch, sequence, V]")
    run.add_argument("arguments", nargs="*", metavar="ARGUMENT",
                     help="of Megatron, after -- (default: none beside the checkpoint's)")  # fmt: skip
    return main


def _conversion_options(command: argparse.ArgumentParser, to_megatron: bool) -> argparse._ArgumentGroup:
    """Adds what the conversions share; returns the group about the output, which may get more."""
    output = command.add_argument_group("output")
    output.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the output (default: the source's)")
    if to_megatron:
        text = "names of norms that this implementation uses (default: local, which runs with and without it)"
        output.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local", help=text)
    checks = command.add_argument_group("checks")
    checks.add_argument("--verify", action="store_true", help="read the output again and compare every bit")
    checks.add_argument("--dry-run", action="store_true", help="check and count, write nothing")
    return output


def main(argv: list[str] | None = None) -> int | None:
    """Entry point; raises UserError for what the user can fix."""
    args = parser().parse_args(argv)
    from megatron_xmoe.checkpoint.names import ConversionError

    try:
        return args.function(args)
    except ConversionError as error:
        raise UserError(str(error)) from error


def silence_libraries() -> None:
    """Hides what torch, Megatron and transformers say about missing accelerators."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    silence_libraries()
    sys.exit(run_tool(PROG, main))
