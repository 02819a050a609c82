# shellcheck shell=bash
# Sourced by the recipes: the parallel layout and the data from environment variables, and the start of the job.
#
# Flags of every recipe; all other options are those of pretrain_xmoe.py, come last and win:
#   --dry-run       build one rank of the job without the others; print parameters and memory (see tools/dry_run.py)
#   --show          print the options that pretrain_xmoe.py (or, with --dry-run, dry_run.py) would get, a word on each
#                   line, and start nothing
#   --help          this text
#
# Environment variables of every recipe (the recipe's own values are the defaults):
#   GPUS, RANK                   the job that --dry-run is for, and its rank (0); training uses the GPUs that are there
#   TP, PP, EP                   tensor-, pipeline- and expert-parallel sizes
#   MBS, GBS, SEQ_LENGTH         micro-batch and global batch in sequences; tokens of a sequence
#   SEQUENCE_PARALLEL            with TP above 1: 1, Megatron's --sequence-parallel (default); 0, tensor-parallel ranks share
#                                the tokens in the Mixture-of-Experts blocks only, as in the X-MoE paper (default of its
#                                models; X-MoE's layers only)
#   RECOMPUTE                    full: each layer is computed again in the backward pass; none (default, except where the
#                                recipe says otherwise)
#   TRAIN_ITERS, PRECISION       iterations (1000); bf16, fp16 or fp32
#   BACKEND                      xmoe (default) or megatron, which computes the same model
#   DATA_PATH                    prefix of a .bin/.idx pair; without it give --mock-data or another data option
#   TOKENIZER_TYPE, TOKENIZER_MODEL  the data's tokenizer (NullTokenizer, which only knows the size of the vocabulary)
#   CHECKPOINTS, SAVE_INTERVAL   folder to save to and to go on from; every so many iterations (500)
#   LAUNCHER                     torchrun (default), or tasks: srun has started this once for each GPU
#   NNODES, GPUS_PER_NODE        for torchrun (1; those found, or 1 process without a GPU)
#   MASTER_ADDR, MASTER_PORT     for torchrun on several nodes: a node's name and a free port of it (29500)
#   PYTHON                       the interpreter (python3)

recipes=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
tools=$(dirname -- "$recipes")
repository=$(dirname -- "$tools")
PYTHON=${PYTHON:-python3}

# The parallel layout: fills PARALLEL from TP, PP, EP, MBS, GBS.
layout_options() {
    PARALLEL=(
        --tensor-model-parallel-size "$TP"
        --pipeline-model-parallel-size "$PP"
        --expert-model-parallel-size "$EP"
        --micro-batch-size "$MBS"
        --global-batch-size "$GBS"
        --use-distributed-optimizer
    )
    # with tensor parallelism each rank has its share of the tokens in the Mixture-of-Experts block, with or without this
    case ${SEQUENCE_PARALLEL:-1},${BACKEND:-xmoe} in
        1,*) if ((TP > 1)); then PARALLEL+=(--sequence-parallel); fi ;;
        0,xmoe) ;;
        *)
            echo "$0: error: SEQUENCE_PARALLEL is $SEQUENCE_PARALLEL; it must be 1, or 0 with BACKEND=xmoe" >&2
            exit 2
            ;;
    esac
    case ${RECOMPUTE:-none} in
        full) PARALLEL+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) ;;
        none) ;;
        *) echo "$0: error: RECOMPUTE is $RECOMPUTE; it must be full or none" >&2; exit 2 ;;
    esac
}

# Precision, data and checkpoints: fills DATA for a vocabulary of $1 tokens and the default precision $2.
data_options() {
    DATA=(--tokenizer-type "${TOKENIZER_TYPE:-NullTokenizer}" --log-interval 1 --log-throughput --eval-iters 0)
    if [[ -n ${TOKENIZER_MODEL:-} ]]; then
        DATA+=(--tokenizer-model "$TOKENIZER_MODEL")
    else
        DATA+=(--vocab-size "$1")
    fi
    if [[ -n ${DATA_PATH:-} ]]; then DATA+=(--data-path "$DATA_PATH"); fi
    if [[ -n ${CHECKPOINTS:-} ]]; then
        DATA+=(--save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval "${SAVE_INTERVAL:-500}" --ckpt-format torch_dist)
    fi
    case ${PRECISION:-$2} in
        bf16) DATA+=(--bf16) ;;
        fp16) DATA+=(--fp16 --initial-loss-scale 65536) ;; # Megatron's first scale, 2^32, is halved 16 times first
        fp32) ;;
        *) echo "$0: error: PRECISION is $PRECISION; it must be bf16, fp16 or fp32" >&2; exit 2 ;;
    esac
}

# Starts what the words say: the arrays of the recipe, then the user's own options.
launch() {
    local words=(--moe-backend "${BACKEND:-xmoe}") program=train show="" word
    for word in "$@"; do
        case $word in
            --dry-run) program=dry_run ;;
            --show) show=1 ;;
            --help | -h) comment_of "$0"; echo; comment_of "$recipes/common.sh" | tail -n +3; exit ;;
            *) words+=("$word") ;;
        esac
    done
    if [[ $program == dry_run ]]; then words=(--gpus "$GPUS" --rank "${RANK:-0}" "${words[@]}"); fi
    if [[ $show ]]; then printf '%s\n' "${words[@]}"; else "$program" "${words[@]}"; fi
}

dry_run() {
    exec "$PYTHON" "$tools/dry_run.py" "$@"
}

# The comment at the top of a file.
comment_of() {
    sed -n '/^#!/d; /^# shellcheck/d; /^#/!q; s/^# \{0,1\}//p' "$1"
}

train() {
    local script=$repository/pretrain_xmoe.py rendezvous=(--standalone)
    if [[ ${LAUNCHER:-torchrun} == tasks ]]; then
        export RANK=${RANK:-$SLURM_PROCID} WORLD_SIZE=${WORLD_SIZE:-$SLURM_NTASKS}
        export LOCAL_RANK=${LOCAL_RANK:-$SLURM_LOCALID}
        exec "$PYTHON" "$script" "$@"
    fi
    if ((${NNODES:-1} > 1)); then
        rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-xmoe}"
            --rdzv-endpoint "${MASTER_ADDR:?name a node of the job}:${MASTER_PORT:-29500}")
    fi
    if [[ -z ${GPUS_PER_NODE:-} ]]; then
        GPUS_PER_NODE=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')
    fi
    exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$GPUS_PER_NODE" "$script" "$@"
}
