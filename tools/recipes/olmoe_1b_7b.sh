#!/usr/bin/env bash
# OLMoE-1B-7B: 6.9e9 parameters, every layer with 64 experts, 8 of them a token.
#
#   bash tools/recipes/olmoe_1b_7b.sh --dry-run
#   bash tools/recipes/olmoe_1b_7b.sh --mock-data
#
# Optimizer, losses and global batch as its report has them; the layout is chosen here.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
: "${GPUS:=8}" "${TP:=1}" "${PP:=1}" "${EP:=8}" "${MBS:=1}" "${GBS:=1024}" "${SEQ_LENGTH:=4096}"

MODEL=(
    --num-layers 16
    --hidden-size 2048
    --ffn-hidden-size 1024
    --num-attention-heads 16
    --kv-channels 128
    --qk-layernorm
    --xmoe-qk-norm all-heads
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings 4096
    --position-embedding-type rope
    --rotary-base 10000
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --init-method-std 0.02
    --attention-dropout 0
    --hidden-dropout 0
)
MOE=(
    --num-experts 64
    --moe-router-topk 8
    --moe-ffn-hidden-size 1024
    --moe-router-pre-softmax
    --moe-router-dtype fp32
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01
    --moe-z-loss-coeff 0.001
)
TRAINING=(
    --train-iters "${TRAIN_ITERS:-5000}"
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --lr 4e-4
    --min-lr 4e-5
    --lr-decay-style cosine
    --lr-warmup-fraction 0.01
    --weight-decay 0.1
    --clip-grad 1.0
)
layout_options
data_options 50304 bf16

launch "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${PARALLEL[@]}" "${DATA[@]}" "$@"
