"""What the start-up block says, and that both backends train."""

import json

from jobs import TOY, run_job

RUN = "--train-iters 2 --expert-model-parallel-size 2".split()


def test_start_up_block(tmp_path):
    load = tmp_path / "load" / "experts.jsonl"
    job = run_job(TOY, RUN, "--moe-backend", "xmoe", "--xmoe-expert-load-file", str(load), processes=2)
    assert job.output.count("backend      xmoe (XMoELayer) for 12 experts, top-3") == 1  # on rank 0 only
    for part in (
        "dispatcher   alltoall",
        "kernels      reference",
        "nodes        1 with 2 process(es)",
        "groups       expert 2, rank 0 with [0, 1]",
        "--moe-token-dispatcher-type alltoall",
        "--transformer-impl local  (Transformer Engine:",
    ):
        assert part in job.output, part
    lines = [json.loads(line) for line in load.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line["layers"]) == {"2", "3", "5", "6"}
        assert all(sum(counts) == 12 * 16 * 3 for counts in line["layers"].values())  # sequences x tokens x top-k


def test_stock_backend():
    job = run_job(TOY, RUN, processes=2)
    assert "backend      megatron (MoELayer, alltoall dispatcher)" in job.output
    assert len(job.losses) == 2


def test_dense_model():
    dense = [
        "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16",
        "--max-position-embeddings", "16", "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-3",
        "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "64", "--eval-iters", "0",
        "--log-interval", "1", "--train-iters", "2", "--tensor-model-parallel-size", "2",
    ]  # fmt: skip
    job = run_job(dense, "--sequence-parallel", processes=2)
    assert "megatron (dense model)" in job.output
    assert len(job.losses) == 2


def test_multi_latent_attention():
    """Value heads of another size than query heads, through torch's attention."""
    mla = (
        "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 8 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
        "--v-head-dim 6 --rope-type rope --moe-backend xmoe"
    ).split()
    without_groups = [part for part in TOY if part != "--group-query-attention"]
    job = run_job(without_groups, RUN, mla, processes=2)
    assert len(job.losses) == 2
