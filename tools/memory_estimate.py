"""Estimates the memory of one rank of a training job from its parameters and what its layers keep for backward."""

from dataclasses import dataclass
from typing import NamedTuple

GIB = 2**30
ADAM_BYTES = 12  # fp32 weights and two fp32 moments, beside weights in half precision
FP32_ADAM_BYTES = 8  # the weights are the fp32 ones


@dataclass(frozen=True)
class Rank:
    """What one rank holds.

    Args:
        dense, expert: numbers of parameters; each kind has its own data-parallel group.
        dense_replicas, expert_replicas: sizes of these groups.
        chunks: layers of each of its model chunks, [without experts, with].
        predicting: the same of multi-token prediction.
        heads: how often it computes logits: for the next token and for each that is predicted beyond.
        in_flight: how many times the activations of these layers are kept at the same time.
    """

    dense: int
    expert: int
    dense_replicas: int
    expert_replicas: int
    chunks: tuple[tuple[int, int], ...]
    predicting: tuple[int, int]
    heads: int
    in_flight: float


def state_bytes(args, rank: Rank) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer states.

    Args: args, Megatron's validated arguments. With the distributed optimizer each data-parallel rank keeps a share of
    the states.
    """
    half = 2 if args.fp16 or args.bf16 else 4
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else half
    per_state = ADAM_BYTES if half == 2 else FP32_ADAM_BYTES
    dense_share, expert_share = (
        (rank.dense_replicas, rank.expert_replicas) if args.use_distributed_optimizer else (1, 1)
    )
    parameters = rank.dense + rank.expert
    return {
        "weights": half * parameters,
        "gradients": gradient * parameters,
        "optimizer states": per_state * (rank.dense / dense_share + rank.expert / expert_share),
    }


def activation_bytes(args, rank: Rank) -> tuple[float, float]:
    """Bytes that the layers of a rank keep for backward, with balanced routing, fused norms and fused attention; and
    those of layers that are computed again, while they are.

    Counted are the inputs of norms and matrix products, queries, keys and values, and the experts' rows and
    pre-activations (X-MoE paper, section 5; Megatron's own Mixture-of-Experts layers keep more); left out are the
    router, masks and what lives only while a layer is computed.
    """
    size = 2 if args.fp16 or args.bf16 else 4
    tensor = args.tensor_model_parallel_size
    whole = args.seq_length * args.micro_batch_size // args.context_parallel_size
    tokens = whole // tensor if args.sequence_parallel else whole
    norm = 2 * tokens * args.hidden_size  # what goes in and what comes out
    attention = norm + whole * _attention_width(args) / tensor
    gated = 2 if args.swiglu else 1
    dense = norm + whole * args.ffn_hidden_size * (gated + 1) / tensor
    experts = 0.0
    if args.num_experts:
        shared = (args.moe_shared_expert_intermediate_size or 0) * (gated + 1) / tensor
        own, width = _routed(args, tokens, gated)
        # what goes into the norm, and the part of what comes out that this rank routes
        experts = (tokens + own) * args.hidden_size + own * args.moe_router_topk * width + whole * shared
    layer = _Elements(tokens * args.hidden_size, attention + dense, attention + experts, experts - norm)
    of_layers = [_of_layers(args, layer, numbers, args.recompute_num_layers) for numbers in rank.chunks]
    # layers of multi-token prediction are computed again each by itself, or not at all
    of_layers.append(_of_layers(args, layer, rank.predicting, 0 if args.recompute_method == "block" else 1))
    # each token predicted beyond the next: a token and a state, and their norms, which a projection takes together
    kept = sum(kept for kept, _ in of_layers) + sum(rank.predicting) * 3 * norm
    # the last norm, and the logits' softmax in fp32
    head = rank.heads * (size * norm + 4 * whole * args.padded_vocab_size / tensor)
    return rank.in_flight * kept * size + head, max(again for _, again in of_layers) * size


class _Elements(NamedTuple):
    """What layers keep if nothing is computed again."""

    input: float
    """Of any layer."""

    dense: float
    """A layer without experts."""

    expert: float
    """A layer with experts."""

    block: float
    """Its Mixture-of-Experts block, without the norm before it."""


def _of_layers(args, layer: _Elements, numbers: tuple[int, int], together: int | None) -> tuple[float, float]:
    """Elements that a chunk's layers keep, and those of what is computed again at a time.

    Args: numbers of layers, without experts and with; --recompute-num-layers.
    """
    number, all_kept = sum(numbers), numbers[0] * layer.dense + numbers[1] * layer.expert
    if args.recompute_granularity == "full" and number:  # groups of layers keep their inputs
        largest = max(layer.dense * bool(numbers[0]), layer.expert * bool(numbers[1]))
        if args.recompute_method == "block":  # the first layers, each by itself
            again = min(together, number)
            return again * layer.input + (number - again) * all_kept / number, largest * bool(again)
        return -(-number // together) * layer.input, min(together, number) * largest
    if args.recompute_granularity == "selective" and "moe" in args.recompute_modules:
        return all_kept - numbers[1] * layer.block, layer.block * bool(numbers[1])
    return all_kept, 0.0


def _routed(args, tokens: int, gated: int) -> tuple[int, float]:
    """Tokens of a rank's Mixture-of-Experts block, of `tokens` that enter it, and elements that X-MoE's experts keep
    for each of their routes."""
    from megatron_xmoe.training.option_table import sequence_mode

    mode, tensor = sequence_mode(args), args.tensor_model_parallel_size
    shards = args.expert_tensor_parallel_size or tensor  # of an expert
    # rows are kept as they arrived; where none is sent they are the tokens, which are the output of the norm
    rows = args.hidden_size if args.expert_model_parallel_size * shards > 1 else 0
    width = rows + (0 if args.xmoe_recompute_activation else gated * args.moe_ffn_hidden_size / shards)
    if mode == "sharded":
        tokens = -(-tokens // tensor)
    # ranks that share an expert get each other's rows, unless they have the same
    return tokens, width * (1 if mode == "duplicated" else shards)


def _attention_width(args) -> int:
    """Elements a token: queries, keys and values as they are projected and again with positions, and the output."""
    heads = args.num_attention_heads
    if args.multi_latent_attention:
        latent = (args.q_lora_rank or 0) + args.kv_lora_rank
        wide = args.qk_head_dim + args.qk_pos_emb_head_dim
        return latent + heads * (3 * wide + args.qk_head_dim + 2 * args.v_head_dim)
    groups = args.num_query_groups if args.group_query_attention else heads
    return 3 * args.kv_channels * (heads + groups)
