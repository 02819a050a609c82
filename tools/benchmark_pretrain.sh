#!/usr/bin/env bash
# Speed of whole training iterations, both backends: the "measured start" model, bf16, all local GPUs or --gpus N.
#
#   bash tools/benchmark_pretrain.sh [--gpus N] [--backends "megatron xmoe"] [extra pretrain_xmoe.py options]
#
# One GPU: global batch 8. N GPUs: expert parallelism N, global batch 8 N. Both backends get the same options, with those
# that stock Megatron needs without Transformer Engine and Apex (the first five below; where these are installed they
# would slow it down, so measure without); X-MoE's kernels are on with them.
# Prints, for each backend, the median time of an iteration after four warm-up iterations, TFLOP/s a GPU (Megatron's
# count), tokens/s, peak memory and losses.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
gpus=""
backends="megatron xmoe"
while [[ $# -gt 0 ]]; do
    case $1 in
        --gpus) gpus=$2; shift 2 ;;
        --backends) backends=$2; shift 2 ;;
        --help | -h) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) break ;;
    esac
done
gpus=${gpus:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
[[ $gpus -ge 1 ]] || { echo "benchmark_pretrain.sh: error: no GPU found; this measures GPUs" >&2; exit 2; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for backend in $backends; do
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} CUDA_DEVICE_MAX_CONNECTIONS=1 "$python" -m torch.distributed.run --standalone \
        --nproc-per-node "$gpus" pretrain_xmoe.py --moe-backend "$backend" \
        --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion \
        --no-masked-softmax-fusion --disable-bias-linear --eval-interval 1000 --eval-iters 0 --num-layers 4 \
        --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 4 \
        --global-batch-size $((8 * gpus)) --expert-model-parallel-size "$gpus" --train-iters 12 --lr 1e-4 \
        --mock-data --tokenizer-type NullTokenizer --vocab-size 50304 --num-experts 64 --moe-ffn-hidden-size 1408 \
        --ffn-hidden-size 1408 --moe-router-topk 6 --moe-router-load-balancing-type aux_loss \
        --moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall --swiglu --normalization RMSNorm \
        --position-embedding-type rope --bf16 --log-interval 1 --log-throughput --attention-dropout 0 \
        --hidden-dropout 0 --untie-embeddings-and-output-weights "$@" > "$log" 2>&1 \
        || { tail -40 "$log" >&2; exit 1; }
    "$python" tools/summarize_log.py "$log" --name "$backend, $gpus GPU(s)" --tokens-per-iteration $((8 * gpus * 2048)) \
        --gpus "$gpus" --skip 4
done
