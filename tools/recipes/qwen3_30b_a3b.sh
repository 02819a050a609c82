#!/usr/bin/env bash
# Qwen3-30B-A3B: 30.5e9 parameters, every layer with 128 experts, 8 of them a token.
#
#   bash tools/recipes/qwen3_30b_a3b.sh --dry-run
#   bash tools/recipes/qwen3_30b_a3b.sh --mock-data
#
# How it was trained is not published: learning rate, batch and layout are chosen here; the coefficient of the auxiliary
# loss is that of its configuration, and it is computed over the global batch, as its report says.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
: "${GPUS:=32}" "${TP:=1}" "${PP:=1}" "${EP:=8}" "${MBS:=1}" "${GBS:=1024}" "${SEQ_LENGTH:=4096}"

MODEL=(
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 4
    --kv-channels 128
    --qk-layernorm
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings 40960
    --position-embedding-type rope
    --rotary-base 1000000
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --init-method-std 0.02
    --attention-dropout 0
    --hidden-dropout 0
)
MOE=(
    --num-experts 128
    --moe-router-topk 8
    --moe-ffn-hidden-size 768
    --moe-router-dtype fp32
    --moe-router-load-balancing-type global_aux_loss
    --moe-aux-loss-coeff 0.001
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
data_options 151936 bf16

launch "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${PARALLEL[@]}" "${DATA[@]}" "$@"
