#!/usr/bin/env bash
# X-MoE Small (X-MoE paper): 10.80e9 parameters in experts and attention.
#
#   bash tools/recipes/xmoe_small.sh --dry-run
#   bash tools/recipes/xmoe_small.sh --mock-data
#
# Layout of the paper: 256 GPUs, EP 8, micro-batch 4, global batch 8192, distributed optimizer (ZeRO-1).
#   SWIGLU=1 and CAPACITY_FACTOR: see tools/recipes/xmoe_paper.sh
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
source "$recipes/xmoe_paper.sh"
: "${GPUS:=256}" "${TP:=1}" "${PP:=1}" "${EP:=8}" "${MBS:=4}" "${GBS:=8192}" "${SEQ_LENGTH:=2048}"

MODEL=(
    --num-layers 28
    --hidden-size 2048
    --ffn-hidden-size 1408
    --num-attention-heads 16
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    "${XMOE_MODEL[@]}"
)
MOE=(
    --num-experts 64
    --moe-router-topk 6
    --moe-ffn-hidden-size 1408
    "${XMOE_MOE[@]}"
)
TRAINING=("${XMOE_TRAINING[@]}")
layout_options
data_options 50257 fp16 # GPT-2's vocabulary, padded to a multiple of 128 TP

launch "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${PARALLEL[@]}" "${DATA[@]}" "$@"
