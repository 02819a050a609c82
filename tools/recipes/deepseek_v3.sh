#!/usr/bin/env bash
# DeepSeek-V3: 671e9 parameters; latent attention, three dense layers, then 256 experts, 8 of them a token, and a shared
# one.
#
#   bash tools/recipes/deepseek_v3.sh --dry-run
#   bash tools/recipes/deepseek_v3.sh --mock-data
#
# Learning rate, batch, losses, initialisation and layout (2048 GPUs, PP 16, EP 64) as its report has them, but with a
# cosine instead of steps, in bf16 instead of FP8, and with experts chosen in groups of 8 as the published model does.
# Positions are scaled as in the published configuration, which is that of the long-context model.
#   MTP                number of tokens predicted further, 1 in the report; its layer has 11.5e9 parameters of its own,
#                      which the published 671e9 do not count (0)
#   LAST_STAGE_LAYERS  layers of the last pipeline stage, where the others share the rest evenly (1)
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
: "${GPUS:=2048}" "${TP:=1}" "${PP:=16}" "${EP:=64}" "${MBS:=1}" "${GBS:=15360}" "${SEQ_LENGTH:=4096}"
: "${RECOMPUTE:=full}" # the first stage keeps 16 micro-batches

MODEL=(
    --num-layers 61
    --hidden-size 7168
    --ffn-hidden-size 18432
    --num-attention-heads 128
    --multi-latent-attention
    --q-lora-rank 1536
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
    --mscale 1.0
    --mscale-all-dim 1.0
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --init-method-std 0.006
    --attention-dropout 0
    --hidden-dropout 0
)
if ((${MTP:-0} > 0)); then MODEL+=(--mtp-num-layers "$MTP" --mtp-loss-scaling-factor 0.3); fi
MOE=(
    --num-experts 256
    --moe-router-topk 8
    --moe-ffn-hidden-size 2048
    --moe-shared-expert-intermediate-size 2048
    --moe-layer-freq '([0]*3+[1]*58)'
    --moe-router-score-function sigmoid
    --moe-router-num-groups 8
    --moe-router-group-topk 4
    --moe-router-topk-scaling-factor 2.5
    --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 0.001
    --moe-router-dtype fp32
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 0.0001
)
TRAINING=(
    --train-iters "${TRAIN_ITERS:-1000}"
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --lr 2.2e-4
    --min-lr 7.3e-6
    --lr-decay-style cosine
    --lr-warmup-fraction 0.02
    --weight-decay 0.1
    --clip-grad 1.0
)
layout_options
if ((PP > 1)); then PARALLEL+=(--decoder-last-pipeline-num-layers "${LAST_STAGE_LAYERS:-1}"); fi
data_options 129280 bf16

launch "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${PARALLEL[@]}" "${DATA[@]}" "$@"
