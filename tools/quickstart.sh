#!/usr/bin/env bash
# Trains a small Mixture-of-Experts model with X-MoE from nothing: environment, text, tokenizer, data, training.
#
#   bash tools/quickstart.sh [--output DIR] [--fresh] [--iterations N]
#
#   --output DIR     folder of the run (default: runs/quickstart in the repository)
#   --fresh          delete the run in that folder first, and start over
#   --iterations N   length of the training, a multiple of 20 (default: 400)
#
# The training stops half-way on purpose and goes on from its checkpoint. At the end there are the loss before and
# after, and a figure of the loss and of the experts' load. Without a GPU it takes two processes and about 3 minutes
# of training on two cores; with GPUs, a larger model in bf16 on up to 8 of them.
#
# Run again, it goes on with an interrupted run, and shows the results of a finished one. The first time, it makes a
# Python environment in .venv (about 3 GB to download), unless the active one has what is needed.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

fail() {
    printf 'quickstart.sh: error: %s\n' "$*" >&2
    exit 1
}
step() { printf '\n== %s\n' "$*"; }

run=$root/runs/quickstart fresh=no iterations=400
while [[ $# -gt 0 ]]; do
    case $1 in
        --output) [[ -n ${2-} ]] || fail "--output needs a folder"; run=$2; shift ;;
        --output=?*) run=${1#*=} ;;
        --fresh) fresh=yes ;;
        --iterations) iterations=${2-}; shift $(($# > 1)) ;;
        --iterations=*) iterations=${1#*=} ;;
        --help | -h) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "unknown option $1. Fix: see --help" ;;
    esac
    shift
done
[[ $iterations =~ ^[1-9][0-9]{0,5}$ && $((iterations % 20)) -eq 0 ]] ||
    fail "--iterations is '$iterations'; it must be a multiple of 20"
[[ $run == /* ]] || run=$PWD/$run

# One quickstart at a time in a folder; processes that it started hold the lock until they end.
lock=
lock_run() {
    [[ -z $lock ]] || exec {lock}>&- # of a folder that --fresh has deleted
    exec {lock}>> "$settings_file"
    flock --nonblock --conflict-exit-code 75 "$lock" 2> /dev/null || [[ $? -ne 75 ]] ||
        fail "another quickstart is at work in $run. Fix: wait for it, or give another folder with --output"
}

# this file marks a folder as a run of this script, and says which
settings_file=$run/quickstart-settings.txt
[[ ! -f $settings_file ]] || lock_run
if [[ $fresh == yes && -f $settings_file ]]; then
    step "Deleting the old run in $run"
    rm -r -- "$run"
elif [[ ! -f $settings_file && -n $(ls -A -- "$run" 2> /dev/null) ]]; then
    fail "$run is not empty and not a run of this script. Fix: give another folder with --output"
fi

step "Python environment"
# shellcheck source=environment.sh
source "$root/tools/environment.sh" plots || exit 1

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)' 2> /dev/null) ||
    fail "$PYTHON cannot import torch. Fix: see what '$PYTHON -c \"import torch\"' says"
if [[ $gpus -gt 0 ]]; then
    processes=1
    while [[ $processes -lt 8 && $((processes * 2)) -le $gpus ]]; do processes=$((processes * 2)); done
    device="$processes of $gpus GPU(s)"
    model=(
        --num-layers 8 --hidden-size 768 --ffn-hidden-size 2304 --num-attention-heads 12 --num-query-groups 4
        --num-experts 64 --moe-router-topk 6 --moe-ffn-hidden-size 256 --moe-shared-expert-intermediate-size 512
        --moe-layer-freq '[0]+[1]*7' --seq-length 512 --max-position-embeddings 512
        --micro-batch-size $((32 / processes)) --global-batch-size 32 --bf16 --lr 1e-3 --min-lr 1e-4
    )
else
    processes=2
    device="the CPU"
    if [[ -e /dev/kfd ]] || nvidia-smi -L > /dev/null 2>&1; then
        printf 'note: this machine has a GPU that torch cannot use (driver and torch do not match); training on the CPU.\n'
    fi
    model=(
        --num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --num-query-groups 2
        --num-experts 16 --moe-router-topk 4 --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 128
        --moe-layer-freq '[0]+[1]*3' --seq-length 128 --max-position-embeddings 128
        --micro-batch-size 8 --global-batch-size 16 --lr 4e-3 --min-lr 4e-4
    )
fi
# shellcheck disable=SC2054 # --split takes a list with commas
model+=(
    --moe-backend xmoe --expert-model-parallel-size "$processes"
    --moe-router-score-function sigmoid --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --group-query-attention --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --train-iters "$iterations" --lr-decay-style cosine --lr-warmup-iters $((iterations / 20))
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --split 97,3,0
    --log-interval $((iterations / 20)) --eval-interval $((iterations / 4)) --eval-iters 10
    --save-interval $((iterations / 4)) --tokenizer-type SentencePieceTokenizer
)

settings=$(printf '%s\n' "processes $processes" "${model[@]}")
if [[ -s $settings_file && $(< "$settings_file") != "$settings" ]]; then
    fail "$run holds a run with other settings. Fix: --fresh deletes it, --output DIR chooses another folder"
fi
mkdir -p -- "$run/data"
lock_run
printf '%s\n' "$settings" > "$settings_file"

data=$run/data
if [[ ! -f $data/tokens.json ]]; then # written last
    step "Text, tokenizer (SentencePiece, 4096 pieces) and data"
    "$PYTHON" "$root/tools/make_demo_corpus.py" --output "$data"
    "$PYTHON" "$root/tools/train_tokenizer.py" --input "$data/corpus.jsonl" --output "$data/tokenizer" --vocab-size 4096
    "$PYTHON" "$root/tools/preprocess_data.py" --input "$data/corpus.jsonl" --output-prefix "$data/tokens" --overwrite \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$data/tokenizer.model"
fi

log=$run/train.log
checkpoints=$run/checkpoints
command=(
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" "$root/pretrain_xmoe.py" "${model[@]}"
    --tokenizer-model "$data/tokenizer.model" --data-path "$data/tokens" --save "$checkpoints" --load "$checkpoints"
    --tensorboard-dir "$run/tensorboard" --xmoe-metrics layers
)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}            # the small matrices gain nothing from several threads
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}     # one machine: needs no host name that resolves
export PYTHONUNBUFFERED=1                               # what is logged is shown at once

iterations_done() {
    local tracker=$checkpoints/latest_checkpointed_iteration.txt
    if [[ -f $tracker ]]; then cat -- "$tracker"; else echo 0; fi
}

# Megatron's log, reduced to a table; the start-up block in full the first time.
show() {
    local line block=no began=$SECONDS full=$1
    local LC_ALL=C # printf reads 8.3E+00 in any locale
    while IFS= read -r line; do
        if [[ $line =~ ^megatron_xmoe\ [0-9] ]]; then block=yes; fi
        if [[ $block == yes && $line == ----* ]]; then
            block=no
            printf '\n%12s %14s %14s %12s\n' iteration loss 's/iteration' elapsed
        elif [[ $block == yes ]]; then
            if [[ $full == yes || $line == backend* ]]; then printf '  %s\n' "$line"; fi
        elif [[ $line =~ iteration\ +([0-9]+)/.*per\ iteration\ \(ms\):\ ([0-9]+).*\ lm\ loss:\ ([^ ]+) ]]; then
            printf '%12s %14.3f %11d.%02d %9d:%02d\n' "${BASH_REMATCH[1]}" "${BASH_REMATCH[3]}" \
                $((BASH_REMATCH[2] / 1000)) $((BASH_REMATCH[2] % 1000 / 10)) \
                $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
        elif [[ $line =~ validation\ loss\ at\ iteration\ ([0-9]+)\ \|\ lm\ loss\ value:\ ([^ ]+) ]]; then
            printf '%12s %14.3f  validation\n' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
        elif [[ $line =~ successfully\ saved\ checkpoint\ from\ iteration\ +([0-9]+) ]]; then
            printf '%12s %14s  checkpoint saved\n' "${BASH_REMATCH[1]}" ''
        elif [[ $line =~ successfully\ loaded\ checkpoint.*\ at\ iteration\ +([0-9]+) ]]; then
            printf '%12s %14s  checkpoint loaded\n' "${BASH_REMATCH[1]}" ''
        fi
    done
}

# Runs the command with more options; the first argument says whether to show the start-up block in full.
train() {
    local status=0 follower full=$1 offset
    shift
    touch -- "$log"
    offset=$(stat -c %s -- "$log")
    printf '\n$%s\n' "$(printf ' %q' "${command[@]}" "$@")" >> "$log"
    # The log is a file and not a pipe: helper processes of a run that was killed would keep a pipe open.
    (cd -- "$root" && exec "${command[@]}" "$@") >> "$log" 2>&1 < /dev/null &
    trainer=$!
    tail -n 0 -f -s 0.5 --pid="$trainer" -- "$log" | show "$full" &
    follower=$!
    wait "$trainer" || status=$?
    trainer=
    wait "$follower" || true
    if [[ $status -ne 0 ]]; then
        printf '\nThe last lines of the log:\n' >&2
        # without torchrun's own report, which comes last and says nothing of the cause
        tail -c +$((offset + 1)) -- "$log" | sed '/torch.distributed.elastic.* failed (exitcode/,$d' | tail -n 20 >&2
        fail "the training failed (exit code $status). The whole log is $log"
    fi
}

stop() {
    trap '' INT TERM
    if [[ -n $trainer ]]; then
        kill -TERM "$trainer" 2> /dev/null || true # torchrun ends its workers
        wait "$trainer" || true
    fi
    printf '\nStopped. Run this again to go on from the last checkpoint.\n' >&2
    exit 130
}
trainer=
trap stop INT TERM

half=$((iterations / 2))
if [[ $(iterations_done) -ge $iterations ]]; then
    step "This run is finished; these are its results (--fresh trains again)"
else
    if [[ $(iterations_done) -lt $half ]]; then
        step "Training, first half: $half of $iterations iterations with $processes process(es) on $device"
        printf "Megatron's own log goes to %s\n\n" "$log"
        train yes --exit-interval "$half"
    fi
    step "Training, second half: a new start that goes on from the checkpoint of iteration $(iterations_done)"
    train no
fi

step "Results"
"$PYTHON" "$root/tools/plot_run.py" --tensorboard-dir "$run/tensorboard" \
    --output "$run/quickstart.png" "$run/quickstart.html"
printf '%-17s %s\n' checkpoints "$checkpoints" log "$log (the command is in it)" tensorboard \
    "$PYTHON -m tensorboard.main --logdir $run/tensorboard"
