#!/usr/bin/env bash
# DeepSeek-V2-Lite: 15.7e9 parameters; latent attention, a dense layer, then 64 experts, 6 of them a token, and two
# shared ones.
#
#   bash tools/recipes/deepseek_v2_lite.sh --dry-run
#   bash tools/recipes/deepseek_v2_lite.sh --mock-data
#
# Learning rate, batch and initialisation as its report has them, but with a cosine instead of steps; the layout is
# chosen here. Positions are scaled as in the published configuration, which is that of the long-context model.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
: "${GPUS:=16}" "${TP:=1}" "${PP:=1}" "${EP:=8}" "${MBS:=1}" "${GBS:=4608}" "${SEQ_LENGTH:=4096}"

MODEL=(
    --num-layers 27
    --hidden-size 2048
    --ffn-hidden-size 10944
    --num-attention-heads 16
    --multi-latent-attention
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --kv-channels 128
    --qk-layernorm
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings 163840
    --position-embedding-type rope
    --rope-type yarn
    --rotary-base 10000
    --rotary-scaling-factor 40
    --mscale 0.707
    --mscale-all-dim 0.707
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
    --moe-layer-freq '([0]+[1]*26)'
    --moe-router-pre-softmax
    --moe-router-dtype fp32
    --moe-router-load-balancing-type seq_aux_loss
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
