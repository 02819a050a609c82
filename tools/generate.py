#!/usr/bin/env python3
"""Completes prompts with a model from a checkpoint of pretrain_xmoe.py or stock Megatron (torch_dist, any layout).

    python tools/generate.py --load DIR --prompt "Once upon a time"
    torchrun --nproc-per-node 2 tools/generate.py --load DIR --prompt "..." --expert-model-parallel-size 2

The model and the tokenizer are those of the arguments that the checkpoint was saved with; other options of Megatron's
that are given here come after them and win. Only the completed prompts go to standard output; what Megatron tells is
shown if something fails, or with --verbose. Nothing is dropped, whatever the training's capacity was, and nothing is
cached between tokens: this is for looking at what was trained.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]  # works without an installation, too

from command_line import OneLineErrorParser  # noqa: E402

# what a checkpoint's arguments say about the model; layout, precision of sums, training and capacity are not among them
MODEL_OPTIONS = """
    num_layers hidden_size num_attention_heads ffn_hidden_size kv_channels seq_length max_position_embeddings
    group_query_attention num_query_groups qk_layernorm qk_l2_norm xmoe_qk_norm attention_output_gate softmax_type
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_scaling_factor
    mscale mscale_all_dim rope_type window_size window_attn_skip_freq apply_query_key_layer_scaling
    attention_softmax_in_fp32 position_embedding_type add_position_embedding use_rotary_position_embeddings rotary_base
    rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor
    no_rope_freq normalization layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias
    apply_residual_connection_post_layernorm fp32_residual_connection openai_gelu squared_relu swiglu quick_geglu
    glu_linear_offset activation_func_clamp_value untie_embeddings_and_output_weights make_vocab_size_divisible_by
    num_experts moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate
    moe_router_topk moe_router_pre_softmax moe_router_score_function moe_router_num_groups moe_router_group_topk
    moe_router_topk_scaling_factor moe_router_dtype moe_router_enable_expert_bias moe_apply_probs_on_input
    xmoe_combine_weights xmoe_group_score fp16 bf16
    vocab_size vocab_file merge_file vocab_extra_ids tokenizer_type tokenizer_model metadata_path tiktoken_pattern
    tiktoken_num_special_tokens tokenizer_sentencepiece_legacy null_tokenizer_eod_id null_tokenizer_pad_id
""".split()
# these choose experts in ways of their own; the others only add a loss
BALANCERS_OF_CHOICE = ("sinkhorn", "quantile_balancing")
NO_TRAINING = """
    --skip-train --mock-data --micro-batch-size 1 --global-batch-size {processes} --eval-iters 0 --lr 0
    --exit-on-missing-checkpoint --ckpt-format torch_dist --no-load-optim --no-load-rng --attention-dropout 0
    --hidden-dropout 0
"""


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This tool's options, and the rest, which is Megatron's."""
    parser = OneLineErrorParser(prog="generate.py", description=__doc__.split("\n\n")[0], epilog="Other options are "
                                "Megatron's, for example --moe-backend or the parallel sizes. Example: python "
                                "tools/generate.py --load DIR --prompt 'Once upon a time'")  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--load", required=True, metavar="DIR", help="directory of the checkpoint")
    model.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: the latest)")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", action="append", required=True, help="text to complete; can be given several times")
    text.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest completion (default: 64)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=1.0, metavar="T",
                          help="of sampling; 0 is greedy (default: 1)")  # fmt: skip
    sampling.add_argument("--top-k", type=int, default=0, metavar="K",
                          help="sample among the K best; 0: all (default: 0)")  # fmt: skip
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P",
                          help="sample among the fewest best with probability P together (default: 1)")  # fmt: skip
    sampling.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--tokens", action="store_true", help="print lists of token numbers instead of text")
    output.add_argument("--verbose", action="store_true", help="show Megatron's messages, on standard error")
    options, rest = parser.parse_known_args(argv)
    if options.max_new_tokens < 1 or options.temperature < 0 or options.top_k < 0 or not 0 < options.top_p <= 1:
        parser.error("--max-new-tokens must be above 0, --temperature and --top-k at least 0, --top-p in (0, 1]")
    if any(word.startswith("--moe-expert-capacity-factor") for word in rest):
        parser.error("--moe-expert-capacity-factor: nothing is dropped here. Fix: leave it out")
    return options, rest


def main(argv: list[str] | None = None) -> int:
    """Load, complete, print; returns the exit code."""
    options, rest = parse(argv)
    results = os.fdopen(os.dup(1), "w")  # Megatron prints its progress to standard output
    os.dup2(2, 1)
    from megatron_xmoe.training.errors import UsageError, one_line

    try:
        with nullcontext() if options.verbose else messages_kept_back(_new_log(options.load), UsageError):
            lines = completions(options, rest)
    except UsageError as error:
        print(f"generate.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    print(*lines, sep="\n", end="\n" if lines else "", file=results, flush=True)
    return 0


def completions(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """What is to be printed: a line for each prompt on the first rank, nothing on the others."""
    from megatron_xmoe.platform import cpu, wheel

    on_cpu = cpu.needed()
    stand_ins = cpu.install() if on_cpu else []
    repairs = wheel.install()
    from megatron_xmoe.training.main import alone_without_launcher, prepare

    alone_without_launcher()
    sys.argv = ["generate.py", *words(options, rest)]  # Megatron's parser reads it
    job = prepare(on_cpu, len(stand_ins), len(repairs), run=lambda container, _: complete(container, options))
    return job(0.0)


def _new_log(load: str) -> str:
    """An empty file of this rank's; the first rank says which."""
    handle, log = tempfile.mkstemp(prefix="generate-", suffix=".log")
    os.close(handle)
    if os.environ.get("RANK", "0") == "0":
        print(f"generate.py: loading {load}; messages go to {log}", file=sys.stderr, flush=True)
    return log


@contextmanager
def messages_kept_back(log: str, told: type[Exception]) -> Iterator[None]:
    """What this process writes meanwhile goes to the file `log`. It is removed after a success or an error `told`, and
    its end is shown after any other; after a hard end (an abort, a signal) it stays."""
    sys.stdout.flush()
    done = False
    with open(log, "w+b") as file:
        kept = os.dup(1), os.dup(2)
        for output in (1, 2):
            os.dup2(file.fileno(), output)
        try:
            yield
            done = True
        except told:
            done = True
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for output, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, output)
                os.close(copy)
            if done:
                os.unlink(log)
            else:
                file.seek(0)
                os.write(2, b"".join(file.readlines()[-40:]) + f"All messages: {log}\n".encode())


def words(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """The command line of the model: the checkpoint's arguments, what a run without training needs, what was given."""
    from megatron_xmoe.training.errors import UsageError

    directory = Path(options.load)
    tracker = directory / "latest_checkpointed_iteration.txt"
    if options.ckpt_step is None and not tracker.is_file():
        raise UsageError(f"--load {directory} holds no checkpoint ({tracker.name} is missing). Fix: check it")
    step = tracker.read_text().strip() if options.ckpt_step is None else str(options.ckpt_step)
    saved = saved_arguments(directory / (step if step == "release" else f"iter_{int(step):07d}"))
    loading = ["--load", str(directory), *(["--ckpt-step", step] if options.ckpt_step is not None else [])]
    fixed = NO_TRAINING.format(processes=os.environ.get("WORLD_SIZE", "1")).split()
    return [*fixed, *model_words(saved), *loading, *rest]


def saved_arguments(directory: Path) -> argparse.Namespace:
    """The arguments that a torch_dist checkpoint was saved with.

    Raises:
        UsageError: it cannot be read, or has none.
    """
    from megatron.core import dist_checkpointing

    from megatron_xmoe.training.errors import UsageError, one_line

    try:
        saved = dist_checkpointing.load_common_state_dict(str(directory)).get("args")
    except Exception as error:  # torch, pickle and the file system fail in many ways
        raise UsageError(
            f"checkpoint {directory} cannot be read ({one_line(error)}). Fix: give one that was saved with "
            "--ckpt-format torch_dist"
        ) from error
    if saved is None:
        raise UsageError(f"checkpoint {directory} has no arguments. Fix: give one that Megatron's training loop saved")
    return saved


def model_words(saved: argparse.Namespace) -> list[str]:
    """The options that build the model of saved arguments."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_xmoe.training.arguments import add_xmoe_arguments

    parser = add_xmoe_arguments(add_megatron_arguments(argparse.ArgumentParser(add_help=False)))
    words = ["--moe-backend", getattr(saved, "moe_backend", "xmoe") if saved.num_experts else "megatron"]
    balancing = saved.moe_router_load_balancing_type
    words += ["--moe-router-load-balancing-type", balancing if balancing in BALANCERS_OF_CHOICE else "none"]
    for action in parser._actions:
        value = getattr(saved, action.dest, action.default)
        if action.dest not in MODEL_OPTIONS or value == action.default:
            continue
        if action.nargs == 0:  # a flag
            words += [action.option_strings[0]] * (value == action.const)
        elif action.nargs in ("+", "*"):
            words += [action.option_strings[0], *map(str, value)]
        else:
            words += [action.option_strings[0], str(value).replace(" ", "") if not isinstance(value, str) else value]
    return words


def complete(container, options: argparse.Namespace) -> list[str]:
    """A line for each prompt, on rank 0; the others return none."""
    import torch.distributed as dist
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args, get_tokenizer
    from megatron.training.training import initialize_megatron, setup_model_and_optimizer

    from megatron_xmoe.training.errors import UsageError

    args = get_args()
    if args.pipeline_model_parallel_size > 1 or args.context_parallel_size > 1:
        raise UsageError("completions need the whole model and sequence on each rank. Fix: leave pipeline and context "
                         "parallelism out; the checkpoint loads into any layout")  # fmt: skip
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder, checkpointing_context={}, cfg_container=container, pg_collection=groups
    )
    model, tokenizer, lines = unwrap_model(models[0]).eval(), get_tokenizer(), []
    for prompt in options.prompt:
        tokens = list(tokenizer.tokenize(prompt))
        if not tokens:
            raise UsageError(f"the prompt {prompt!r} has no token. Fix: give a longer one")
        tokens = continued(model, tokens, options, args, getattr(tokenizer, "eod", None), tokenizer.vocab_size)
        lines.append(json.dumps(tokens) if options.tokens else tokenizer.detokenize(tokens))
    return lines if dist.get_rank() == 0 else []


def continued(model, tokens: list[int], options, args, end: int | None, vocabulary: int) -> list[int]:
    """`tokens` and their continuation, until the end token or the greatest length.

    Args:
        model: of one pipeline stage, in evaluation mode.
        options: of this tool.
        args: Megatron's.
        end: the token that ends a document, if there is one.
        vocabulary: number of tokens; the model may have some more, for padding.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    generator = torch.Generator().manual_seed(options.seed)
    limit, split = len(tokens) + options.max_new_tokens, args.tensor_model_parallel_size
    if args.position_embedding_type == "learned_absolute":
        limit = min(limit, args.max_position_embeddings // split * split)
    device = next(model.parameters()).device
    # one shape for all lengths (what comes later is not seen), which sequence parallelism can split
    length = -(-limit // split) * split
    positions = torch.arange(length, device=device).unsqueeze(0)
    while len(tokens) < limit:
        row = torch.tensor([tokens + [0] * (length - len(tokens))], device=device)
        with torch.no_grad():
            logits = gather_from_tensor_model_parallel_region(model(row, positions, None))
        token = sample(logits[0, len(tokens) - 1, :vocabulary], options, generator).to(device)
        dist.broadcast(token, src=0)
        tokens = [*tokens, int(token)]
        if tokens[-1] == end:
            break
    return tokens


def sample(logits, options, generator):
    """The next token, [1] int64.

    Args:
        logits: [V].
        options: `temperature` (0 takes the best), `top_k` (0 for all) and `top_p` (1 for all), the latter of what the
            former leaves.
        generator: of random numbers on the CPU.
    """
    import torch

    logits = logits.double().cpu()
    if options.temperature == 0:
        return logits.argmax().unsqueeze(0)
    values, tokens = torch.sort(logits / options.temperature, descending=True, stable=True)
    if options.top_k:
        values, tokens = values[: options.top_k], tokens[: options.top_k]
    probs = torch.softmax(values, dim=0)
    before = probs.cumsum(dim=0) - probs  # the best is always kept
    kept = before < options.top_p
    return tokens[torch.multinomial(probs * kept, 1, generator=generator)]


if __name__ == "__main__":
    sys.exit(main())
