# shellcheck shell=bash disable=SC2034
# Sourced by the X-MoE recipes: what the four models of the paper have in common.
#
# Environment variables:
#   SWIGLU            1: experts of three matrices with SwiGLU instead of two with GELU; the same FFN size, so half as
#                     many parameters again (0)
#   SEQUENCE_PARALLEL 0: sequence-sharded blocks where TP is above 1, as in the paper (0; 1 with BACKEND=megatron)
#   CAPACITY_FACTOR   of dropping, as the paper trains; none: every route is kept (1.25)

if [[ ${BACKEND:-xmoe} == xmoe ]]; then : "${SEQUENCE_PARALLEL:=0}"; fi

XMOE_MODEL=(
    --normalization LayerNorm
    --position-embedding-type rope
    --disable-bias-linear
    --init-method-std 0.014
    --attention-dropout 0 # not published
    --hidden-dropout 0    # not published
)
if [[ ${SWIGLU:-0} == 1 ]]; then XMOE_MODEL+=(--swiglu); fi

XMOE_MOE=(
    --moe-router-pre-softmax # weights are probabilities among all experts, not among the chosen
    --moe-router-dtype fp32
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01
)
if [[ ${CAPACITY_FACTOR:=1.25} != none ]]; then
    XMOE_MOE+=(--moe-expert-capacity-factor "$CAPACITY_FACTOR" --moe-token-drop-policy probs)
    if [[ ${BACKEND:-xmoe} == xmoe ]]; then XMOE_MOE+=(--xmoe-min-capacity 4); fi
fi

XMOE_TRAINING=(
    --train-iters "${TRAIN_ITERS:-1000}" # not published
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --lr 1.2e-4
    --min-lr 1e-6
    --lr-decay-style cosine
    --weight-decay 0.1
    --clip-grad 1.0
)
