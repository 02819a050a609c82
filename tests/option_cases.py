"""Command lines that show each served option: both backends train them to the same losses and updates."""

from dataclasses import dataclass

# two layers with eight small experts: a run is about a second; weights so large that the loss depends on every expert
MODEL = """
    --num-layers 2 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 24 --seq-length 16
    --max-position-embeddings 16 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 12 --init-method-std 0.3
    --vocab-size 60 --make-vocab-size-divisible-by 1 --tokenizer-type NullTokenizer
""".split()
# plain SGD: Adam hides gradients that are wrong by a constant factor
TRAINING = """
    --micro-batch-size 2 --global-batch-size 8 --train-iters 10 --lr 0.1 --min-lr 0.1 --seed 7
    --optimizer sgd --sgd-momentum 0 --clip-grad 0 --weight-decay 0
    --log-interval 1 --eval-iters 0 --num-workers 0 --split 1,0,0
""".split()


@dataclass(frozen=True)
class Case:
    """Options on top of MODEL and TRAINING, and where they are run."""

    options: str
    """May hold {directory}, a new one of each run."""

    layouts: tuple[str, ...] = ("one process", "EP2")

    slow: bool = False
    """Only with --slow: the option is shown elsewhere too, or only passed through."""

    half: bool = False
    """Computed in 16 bits: the backends agree only as far as that goes."""

    overflows: bool = False
    """The first loss scale is too large, so that the optimizer must skip some iterations (fp16)."""

    stock: str | None = None
    """Options for stock Megatron, where they are not the same."""

    loaded: bool = False
    """Both start from weights that stock Megatron saved: where their options differ, so does initialisation."""

    oracle: bool = False
    """Stock Megatron drops by tests/recorder.py's loop, because its own choice among equals is arbitrary."""


LAYOUTS = {
    "one process": (1, ""),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "TP2 ETP2": (2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2"),
    "TP2 ETP1": (2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"),
    "TP2 EP2 ETP2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2 "
        "--expert-model-parallel-size 2",
    ),
    "TP2": (2, "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "TP2 EP2": (2, "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "TP2 whole sequence ETP2": (2, "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
}

AUX = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-1"
NO_AUX = "--moe-router-load-balancing-type none"
# sequences that begin with the same token, or with one token twice, give it equal weights, and of equal ones Megatron
# keeps any, X-MoE the earliest
NO_TIES = "--micro-batch-size 1 --position-embedding-type learned_absolute"
# each backend rounds at other places: where losses depend on every expert, a rounding can choose another expert
SMALL_WEIGHTS = "--init-method-std 0.02 --lr 0.3 --min-lr 0.3"

CASES = {
    "softmax": Case(f"{AUX} --moe-z-loss-coeff 1e-2 --moe-per-layer-logging"),
    "softmax over all experts": Case(
        f"{AUX} --moe-router-pre-softmax --moe-router-topk-scaling-factor 2.5 --moe-router-dtype fp32"
    ),
    "sigmoid with expert bias in groups": Case(
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2 "
        "--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5 "
        "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-1 --moe-router-dtype fp64"
    ),
    "square root of softplus": Case(
        f"{NO_AUX} --moe-router-score-function sqrtsoftplus --moe-router-enable-expert-bias "
        "--moe-router-bias-update-rate 1e-2"
    ),
    "softmax in groups": Case(f"{NO_AUX} --moe-router-num-groups 4 --moe-router-group-topk 2", slow=True),
    "sinkhorn": Case("--moe-router-load-balancing-type sinkhorn"),
    "sinkhorn top-1": Case("--moe-router-load-balancing-type sinkhorn --moe-router-topk 1", slow=True),
    "quantile balancing": Case(
        "--moe-router-load-balancing-type quantile_balancing --moe-router-quantile-balancing-ema 0.5"
    ),
    "three auxiliary losses": Case(
        "--moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss "
        "--moe-aux-loss-coeff 1e-1 5e-2 2e-1 --moe-z-loss-coeff 1e-2"
    ),
    "global auxiliary loss": Case(
        "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-1", slow=True
    ),
    "loss per token": Case(f"{AUX} --moe-z-loss-coeff 1e-2 --calculate-per-token-loss", slow=True),
    "input jitter": Case(f"{AUX} --moe-input-jitter-eps 0.1"),
    "forced balance": Case(f"{NO_AUX} --moe-router-force-load-balancing"),
    "forced imbalance": Case(f"{NO_AUX} --moe-router-force-biased 1.0"),
    "routing replay": Case(f"{AUX} --moe-enable-routing-replay", slow=True),
    "routing trace": Case(
        f"{AUX} --moe-routing-trace-path {{directory}} --moe-routing-trace-max-training-iters 2 "
        "--moe-routing-trace-capture-logits --moe-routing-trace-capture-hidden-states "
        "--moe-routing-trace-dump-weights",
        slow=True,
    ),
    "shared experts": Case(f"{AUX} --moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate"),
    "overlapped shared experts": Case(
        f"{AUX} --moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate --moe-shared-expert-overlap",
        ("one process", "EP2", "TP2 ETP2"),
    ),
    "dense layers": Case(f"{AUX} --moe-layer-freq [0,1]", slow=True),
    "recomputed layers": Case(
        f"{AUX} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1", slow=True
    ),
    "recomputed blocks": Case(
        f"{AUX} --recompute-granularity full --recompute-method block --recompute-num-layers 1", slow=True
    ),
    "recomputed experts": Case(
        f"{AUX} --moe-z-loss-coeff 1e-2 --recompute-granularity selective --recompute-modules moe "
        "--moe-shared-expert-intermediate-size 16 --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
    ),
    "recomputed experts by the old option": Case(f"{AUX} --moe-layer-recompute", slow=True),
    "recomputed pre-activation": Case(
        f"{AUX} --xmoe-recompute-activation --recompute-granularity selective --recompute-modules core_attn",
        stock=AUX,
    ),
    "gradients added by the products": Case(
        f"{AUX} --xmoe-gradient-accumulation-fusion on --overlap-grad-reduce",
        stock=AUX,
    ),
    "gradients added by the hooks": Case(f"{AUX} --xmoe-gradient-accumulation-fusion off", stock=AUX, slow=True),
    "recomputed modules": Case(
        f"{AUX} --recompute-granularity selective --recompute-modules core_attn mlp shared_experts "
        "--moe-shared-expert-intermediate-size 16 --moe-layer-freq [0,1]"
    ),
    "recomputed attention": Case(f"{AUX} --recompute-activations", slow=True),
    "several tokens at once": Case(
        f"{AUX} --moe-z-loss-coeff 1e-2 --mtp-num-layers 2 --mtp-loss-scaling-factor 0.3",
        ("one process", "EP2", "TP2 ETP1"),
    ),
    "several tokens by one layer": Case(
        f"{AUX} --mtp-num-layers 2 --mtp-use-repeated-layer --mtp-detach-heads", slow=True
    ),
    "several tokens over pipeline stages": Case(f"{AUX} --mtp-num-layers 1", ("PP2",)),
    "several tokens on a stage of their own": Case(
        f"{AUX} --mtp-num-layers 1 --pipeline-model-parallel-layout Ett|mL", ("PP2",), slow=True
    ),
    "tensor-parallel experts": Case(f"{AUX} --moe-z-loss-coeff 1e-2", ("TP2 ETP2", "TP2 EP2 ETP2")),
    # stock Megatron trains with tensor parallelism only where the sequence is sharded everywhere
    "sharded sequence": Case(
        f"{AUX} --moe-z-loss-coeff 1e-2 --xmoe-sequence-shard on",
        ("TP2",),
        loaded=True,
        stock=f"{AUX} --moe-z-loss-coeff 1e-2 --sequence-parallel",
    ),
    "sharded sequence by default": Case(
        f"{AUX} --moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate",
        ("TP2 EP2",),
        loaded=True,
        stock=f"{AUX} --moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate --sequence-parallel",
    ),
    "duplicated sequence": Case(
        f"{AUX} --moe-z-loss-coeff 1e-2 --xmoe-sequence-shard off",
        ("TP2 EP2",),
        loaded=True,
        stock=f"{AUX} --moe-z-loss-coeff 1e-2 --sequence-parallel",
    ),
    "duplicated sequence, tensor-parallel experts": Case(
        f"{AUX} --xmoe-sequence-shard off",
        ("TP2 whole sequence ETP2",),
        slow=True,
        loaded=True,
        stock=f"{AUX} --sequence-parallel",
    ),
    "capacity by weight": Case(
        f"{AUX} {NO_TIES} --moe-expert-capacity-factor 1.0 --moe-token-drop-policy probs",
        ("one process", "EP2", "TP2 ETP2"),
    ),
    "capacity by position": Case(
        f"{AUX} --moe-expert-capacity-factor 0.6 --moe-token-drop-policy position", oracle=True
    ),
    # 16 tokens of a micro-batch, 3 experts each, 8 experts: 6 routes times the factor
    "smallest capacity": Case(
        f"{AUX} {NO_TIES} --moe-expert-capacity-factor 0.1 --xmoe-min-capacity 3",
        stock=f"{AUX} {NO_TIES} --moe-expert-capacity-factor 0.5",
    ),
    "capacity with expert bias": Case(
        f"{NO_AUX} {NO_TIES} --moe-expert-capacity-factor 0.75 --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2",
        slow=True,
    ),
    "fp16": Case(
        f"{AUX} {SMALL_WEIGHTS} --moe-z-loss-coeff 1e-2 --fp16 --initial-loss-scale 524288 --hysteresis 1 "
        "--min-loss-scale 2",
        half=True,
        overflows=True,
    ),
    "bf16": Case(f"{AUX} {SMALL_WEIGHTS} --bf16", half=True, slow=True),
    "weights on the input": Case(
        f"{AUX} --moe-router-topk 1 --moe-router-pre-softmax --moe-apply-probs-on-input", slow=True
    ),
}
