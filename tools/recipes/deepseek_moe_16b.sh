#!/usr/bin/env bash
# DeepSeek-MoE-16B: 16.4e9 parameters; a dense layer, then 64 experts, 6 of them a token, and two shared ones.
#
#   bash tools/recipes/deepseek_moe_16b.sh --dry-run
#   bash tools/recipes/deepseek_moe_16b.sh --mock-data
#
# Learning rate, batch and initialisation as its report has them, but with a cosine instead of steps; the layout is
# chosen here.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
: "${GPUS:=16}" "${TP:=1}" "${PP:=1}" "${EP:=8}" "${MBS:=1}" "${GBS:=4608}" "${SEQ_LENGTH:=4096}"

MODEL=(
    --num-layers 28
    --hidden-size 2048
    --ffn-hidden-size 10944
    --num-attention-heads 16
    --kv-channels 128
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings 4096
    --position-embedding-type rope
    --rotary-base 10000
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --init-method-std 0.006
    --attention-dropout 0
    --hidden-dropout 0
)
MOE=(
    --num-experts 64
    --moe-router-topk 6
    --moe-ffn-hidden-size 1408
    --moe-shared-expert-intermediate-size 2816
    --moe-layer-freq '([0]+[1]*27)'
    --moe-router-pre-softmax
    --moe-router-dtype fp32
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.001
)
TRAINING=(
    --train-iters "${TRAIN_ITERS:-1000}"
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --lr 4.2e-4
    --min-lr 4.2e-5
    --lr-decay-style cosine
    --lr-warmup-fraction 0.02
    --weight-decay 0.1
    --clip-grad 1.0
)
layout_options
data_options 102400 bf16

launch "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${PARALLEL[@]}" "${DATA[@]}" "$@"
