"""The memory estimate of a dry run against what a model keeps, and against sums by hand."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from jobs import REPOSITORY, run_script

sys.path.insert(0, str(REPOSITORY / "tools"))

from memory_estimate import Rank, activation_bytes, state_bytes  # noqa: E402

LAYERS, HIDDEN, TOKENS = 6, 64, 512
MODEL = f"""--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads 4 --ffn-hidden-size 96 --seq-length 256
    --max-position-embeddings 256 --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --num-experts 8 --moe-router-topk 3
    --moe-ffn-hidden-size 48 --micro-batch-size 2 --global-batch-size 2 --lr 1e-3 --train-iters 1 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 256 --moe-backend xmoe""".split()


@pytest.mark.parametrize(
    ("options", "unfused"),
    [
        ("", 0),
        ("--swiglu", 0),
        ("--swiglu --xmoe-recompute-activation", 0),
        ("--swiglu --moe-router-topk 6 --group-query-attention --num-query-groups 2", 0),
        # a gate that is computed by itself: 4 shared experts of 64, two dense layers of 96
        ("--swiglu --moe-layer-freq [0,1,1,0,1,1] --moe-shared-expert-intermediate-size 64", 4 * 64 + 2 * 96),
        ("--swiglu --mtp-num-layers 1", 2 * HIDDEN),
    ],
)
def test_estimate_of_what_a_forward_pass_keeps(options, unfused):
    kept, estimated = kept_and_estimated(options)
    # kept on a CPU only, where norms and gates of dense layers are not fused: normalised values, activated gates
    on_cpu = 4 * TOKENS * ((2 * LAYERS + 1) * HIDDEN + unfused)
    assert 0.87 * kept < estimated + on_cpu < 1.02 * kept


@pytest.mark.parametrize(
    ("options", "norms"),
    [
        # one group of three layers after the other, which keep their inputs only
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 3", 0),
        pytest.param("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 0,
                     marks=pytest.mark.slow),
        # the first two layers
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 2", 2 * (LAYERS - 2)),
        pytest.param("--recompute-granularity selective --recompute-modules moe", 2 * LAYERS, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_estimate_with_recomputation(options, norms):
    """Of `norms` and the last one, values are kept on a CPU that are not elsewhere."""
    kept, estimated = kept_and_estimated(f"--swiglu {options}")
    assert 0.87 * kept < estimated + 4 * TOKENS * (norms + 1) * HIDDEN < 1.02 * kept


TP2 = "--tensor-model-parallel-size 2 --swiglu --moe-router-topk 6"


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ("--expert-model-parallel-size 2", 1),  # a sharded sequence
        pytest.param("--expert-model-parallel-size 2 --sequence-parallel", 2, marks=pytest.mark.slow),
        pytest.param("--expert-tensor-parallel-size 2 --sequence-parallel", 2, marks=pytest.mark.slow),
        pytest.param("--expert-tensor-parallel-size 2 --xmoe-sequence-shard off", 1, marks=pytest.mark.slow),
        pytest.param("--expert-model-parallel-size 2 --xmoe-sequence-shard off", 1, marks=pytest.mark.slow),
    ],
)
def test_estimate_with_tensor_parallelism(options, share):
    """Of `share` ranks each has its part of the sequence outside of the blocks."""
    kept, estimated = kept_and_estimated(f"{TP2} {options}", processes=2)
    on_cpu = 4 * TOKENS // share * (2 * LAYERS + 1) * HIDDEN
    assert 0.87 * kept < estimated + on_cpu < 1.02 * kept


def kept_and_estimated(options: str, processes: int = 1) -> tuple[int, float]:
    """Bytes, of the last rank."""
    job = run_script(Path(__file__).with_name("memory_job.py"), *MODEL, *options.split(), processes=processes)
    kept, estimated, again = json.loads(job.output.splitlines()[-1])
    assert (again > 0) == ("recompute-granularity" in options)
    return kept, estimated


def test_states_are_shared_by_the_data_parallel_ranks():
    args = Namespace(bf16=True, fp16=False, accumulate_allreduce_grads_in_fp32=True, use_distributed_optimizer=True)
    rank = Rank(1000, 600, dense_replicas=10, expert_replicas=2, chunks=((1, 1),), predicting=(0, 0), heads=1,
                in_flight=1)  # fmt: skip
    found = state_bytes(args, rank)
    assert found == {"weights": 3200, "gradients": 6400, "optimizer states": 12 * (100 + 300)}
    args.use_distributed_optimizer = False
    assert state_bytes(args, rank)["optimizer states"] == 12 * 1600
    args.bf16 = args.accumulate_allreduce_grads_in_fp32 = False
    assert state_bytes(args, rank) == {"weights": 6400, "gradients": 6400, "optimizer states": 8 * 1600}


SIZES = Namespace(
    bf16=True, fp16=False, tensor_model_parallel_size=1, sequence_parallel=False, seq_length=8, micro_batch_size=1,
    context_parallel_size=1, hidden_size=16, ffn_hidden_size=32, swiglu=False, num_experts=None, kv_channels=4,
    num_attention_heads=4, group_query_attention=False, multi_latent_attention=False, padded_vocab_size=50,
    recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1,
)  # fmt: skip
LAYER = 8 * (2 * 16 + 3 * 4 * 8 + 2 * 16 + 2 * 32)  # norms, queries and the like, the dense network
INPUT = 8 * 16


@pytest.mark.parametrize(
    ("method", "together", "kept", "again"),
    [
        ("uniform", 1, 8 * INPUT, LAYER),
        ("uniform", 3, 2 * 2 * INPUT, 3 * LAYER),  # of each chunk's four layers three, and one
        ("uniform", 9, 2 * INPUT, 4 * LAYER),
        ("block", 1, 2 * (INPUT + 3 * LAYER), LAYER),
        ("block", 9, 8 * INPUT, LAYER),
    ],
)
def test_recomputation_is_of_each_chunk(method, together, kept, again):
    """Two chunks of four layers, two and a half micro-batches of which are in flight."""
    args = Namespace(**vars(SIZES) | {"recompute_method": method, "recompute_num_layers": together})
    rank = Rank(0, 0, dense_replicas=1, expert_replicas=1, chunks=((4, 0), (4, 0)), predicting=(0, 0), heads=0,
                in_flight=2.5)  # fmt: skip
    assert activation_bytes(args, rank) == (2 * 2.5 * kept, 2 * again)


def test_logits_are_kept_where_they_are_computed():
    """And what multi-token prediction adds to a layer where that is."""
    args = Namespace(**vars(SIZES) | {"recompute_granularity": None})
    elsewhere = dict(dense_replicas=1, expert_replicas=1, in_flight=2)
    predicting = Rank(0, 0, chunks=((0, 0),), predicting=(1, 0), heads=0, **elsewhere)
    assert activation_bytes(args, predicting) == (2 * 2 * (LAYER + 3 * 2 * INPUT), 0)
    last = Rank(0, 0, chunks=((0, 0),), predicting=(0, 0), heads=2, **elsewhere)
    assert activation_bytes(args, last) == (2 * (2 * 2 * INPUT + 4 * 8 * 50), 0)
