#!/usr/bin/env bash
# X-MoE Medium (X-MoE paper): 59.3e9 parameters in experts and attention.
#
#   bash tools/recipes/xmoe_medium.sh --dry-run
#   bash tools/recipes/xmoe_medium.sh --mock-data
#
# Layout of the paper: 256 GPUs, EP 64, micro-batch 1, global batch 1024.
#   SWIGLU=1 and CAPACITY_FACTOR: see tools/recipes/xmoe_paper.sh
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
source "$recipes/xmoe_paper.sh"
: "${GPUS:=256}" "${TP:=1}" "${PP:=1}" "${EP:=64}" "${MBS:=1}" "${GBS:=1024}" "${SEQ_LENGTH:=4096}"

MODEL=(
    --num-layers 28
    --hidden-size 5120
    --ffn-hidden-size 1536
    --num-attention-heads 128
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    "${XMOE_MODEL[@]}"
)
MOE=(
    --num-experts 128
    --moe-router-topk 6
    --moe-ffn-hidden-size 1536
    "${XMOE_MOE[@]}"
)
TRAINING=("${XMOE_TRAINING[@]}")
layout_options
data_options 50257 fp16 # GPT-2's vocabulary, padded to a multiple of 128 TP

launch "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${PARALLEL[@]}" "${DATA[@]}" "$@"
