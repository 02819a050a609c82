#!/usr/bin/env bash
# X-MoE Large (X-MoE paper): 216.2e9 parameters in experts and attention.
#
#   bash tools/recipes/xmoe_large.sh --dry-run
#   bash tools/recipes/xmoe_large.sh --mock-data
#
# Layout of the paper: 256 GPUs, EP 64, TP 2, micro-batch 1, global batch 1024.
#   SWIGLU=1 and CAPACITY_FACTOR: see tools/recipes/xmoe_paper.sh
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
source "$recipes/xmoe_paper.sh"
: "${GPUS:=256}" "${TP:=2}" "${PP:=1}" "${EP:=64}" "${MBS:=1}" "${GBS:=1024}" "${SEQ_LENGTH:=4096}"

MODEL=(
    --num-layers 28
    --hidden-size 7168
    --ffn-hidden-size 2048
    --num-attention-heads 128
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    "${XMOE_MODEL[@]}"
)
MOE=(
    --num-experts 256
    --moe-router-topk 8
    --moe-ffn-hidden-size 2048
    "${XMOE_MOE[@]}"
)
TRAINING=("${XMOE_TRAINING[@]}")
layout_options
data_options 50257 fp16 # GPT-2's vocabulary, padded to a multiple of 128 TP

launch "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${PARALLEL[@]}" "${DATA[@]}" "$@"
