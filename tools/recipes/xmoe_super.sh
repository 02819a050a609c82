#!/usr/bin/env bash
# X-MoE Super (X-MoE paper): 585.6e9 parameters in experts and attention.
#
#   bash tools/recipes/xmoe_super.sh --dry-run
#   bash tools/recipes/xmoe_super.sh --mock-data
#
# Published: 1024 GPUs, EP of 256 at most. Not published, and chosen here: 128 attention heads (any number gives the same
# parameters), TP 4, micro-batch 1, global batch 1024.
#   SWIGLU=1 and CAPACITY_FACTOR: see tools/recipes/xmoe_paper.sh
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
source "$recipes/xmoe_paper.sh"
: "${GPUS:=1024}" "${TP:=4}" "${PP:=1}" "${EP:=256}" "${MBS:=1}" "${GBS:=1024}" "${SEQ_LENGTH:=4096}"

MODEL=(
    --num-layers 61
    --hidden-size 7168
    --ffn-hidden-size 2560
    --num-attention-heads 128
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    "${XMOE_MODEL[@]}"
)
MOE=(
    --num-experts 256
    --moe-router-topk 8
    --moe-ffn-hidden-size 2560
    "${XMOE_MOE[@]}"
)
TRAINING=("${XMOE_TRAINING[@]}")
layout_options
data_options 50257 fp16 # GPT-2's vocabulary, padded to a multiple of 128 TP

launch "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${PARALLEL[@]}" "${DATA[@]}" "$@"
