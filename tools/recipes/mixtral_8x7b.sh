#!/usr/bin/env bash
# Mixtral-8x7B: 46.7e9 parameters, every layer with 8 experts, 2 of them a token.
#
#   bash tools/recipes/mixtral_8x7b.sh --dry-run
#   bash tools/recipes/mixtral_8x7b.sh --mock-data
#
# How it was trained is not published: learning rate, batch and layout are chosen here; the coefficient of the auxiliary
# loss is that of its configuration.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
: "${GPUS:=64}" "${TP:=1}" "${PP:=1}" "${EP:=8}" "${MBS:=1}" "${GBS:=1024}" "${SEQ_LENGTH:=4096}"

MODEL=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings 32768
    --position-embedding-type rope
    --rotary-base 1000000
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
    --num-experts 8
    --moe-router-topk 2
    --moe-ffn-hidden-size 14336
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.02
)
TRAINING=(
    --train-iters "${TRAIN_ITERS:-1000}"
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --lr 3e-4
    --min-lr 3e-5
    --lr-decay-style cosine
    --weight-decay 0.1
    --clip-grad 1.0
)
layout_options
data_options 32000 bf16

launch "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${PARALLEL[@]}" "${DATA[@]}" "$@"
