"""Bad input ends every rank within seconds, with one line that holds the value, the rule and the fix."""

import json
import re
import shutil
import time

import numpy
import pytest
from jobs import TOY, run_job

XMOE = "--moe-backend xmoe --train-iters 2".split()
REAL_DATA = [part for part in TOY if part != "--mock-data"]


def assert_told(job, processes, *parts):
    """Every rank that prints tells it in one line without a traceback, and all parts are in it."""
    assert job.returncode != 0
    lines = job.told()
    # torchrun ends the other ranks once one has failed, so not all of them need to have printed
    assert 1 <= len(lines) <= processes, job.errors[-3000:]
    for line in lines:
        assert all(part in line for part in parts), line
    ours = job.errors.split("torch/distributed/elastic", 1)[0]  # torchrun adds its own
    assert "Traceback" not in ours, ours[-3000:]


COMMAND_LINES = {
    "world size": ("--tensor-model-parallel-size 3", ["2", "3", "Fix:"]),
    "experts": ("--expert-model-parallel-size 5", ["--num-experts, 12", "5", "Fix:"]),
    "batch": ("--micro-batch-size 5", ["--global-batch-size, 12", "Fix:"]),
    "layers": ("--pipeline-model-parallel-size 2 --num-layers 5 --moe-layer-freq 1", ["--num-layers, 5", "2", "Fix:"]),
    "heads": ("--hidden-size 33", ["33", "--num-attention-heads, 4", "Fix:"]),
    "no experts": ("--num-experts 0", ["--moe-backend xmoe", "--num-experts N", "Fix:"]),
    "top-k": ("--moe-router-topk 13", ["13", "12", "Fix:"]),
    "upcycling": ("--moe-use-upcycling", ["--moe-use-upcycling", "Fix:"]),
    "unknown option": ("--moe-router-topq 3", ["--moe-router-topq", "Fix:"]),
    "not served": ("--moe-latent-size 8", ["--moe-latent-size 8", "Fix:"]),
    "matrix products": ("--xmoe-grouped-gemm torch", ["--xmoe-grouped-gemm torch cannot run on", "Fix:"]),
    "not served with these values": ("--recompute-granularity selective --recompute-modules moe_act",
                                     ["--recompute-modules moe_act", "Fix:"]),
    "sequence parallelism": (
        "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 15",
        ["--tensor-model-parallel-size, 2", "--seq-length, 15", "Fix:"],
    ),
    "no size of a node": ("--xmoe-ranks-per-node 2,x", ["--xmoe-ranks-per-node is '2,x'", "Fix:"]),
    "nodes that are not filled": ("--xmoe-ranks-per-node 4", ["--xmoe-ranks-per-node 4", "2", "Fix:"]),
    "placement with a stage between": (
        "--xmoe-ep-placement dp-first --use-tp-pp-dp-mapping --pipeline-model-parallel-size 2",
        ["--xmoe-ep-placement dp-first", "--use-tp-pp-dp-mapping", "Fix:"],
    ),
    "placement and other groups": (
        "--xmoe-ep-placement dp-first --create-all-gather-group",
        ["--xmoe-ep-placement dp-first", "--create-all-gather-group", "Fix:"],
    ),
    "tokenizer": ("--tokenizer-type SentencePieceTokenizer --tokenizer-model nowhere.model", ["nowhere.model"]),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_command_line(case):
    options, parts = COMMAND_LINES[case]
    start = time.monotonic()
    as_a_user = case in ("world size", "not served")  # with torchrun, which ends the other ranks
    job = run_job(TOY, XMOE, options.split(), processes=2, fails=True, torchrun=as_a_user)
    assert_told(job, 2, *parts)
    assert time.monotonic() - start < 60


@pytest.fixture
def data(tmp_path):
    """A small data set in Megatron's format, and its prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    generator = numpy.random.default_rng(0)
    for _ in range(40):
        builder.add_document(generator.integers(0, 60, size=50), [50])
    builder.finalize(f"{prefix}.idx")
    return prefix


def run_on(prefix, *options):
    return run_job(REAL_DATA, XMOE, "--data-path", str(prefix), "--split", "1,0,0", *options, processes=2, fails=True)


def test_good_data_trains(data):
    job = run_on(data)
    assert job.returncode == 0 and len(job.losses) == 2, job.errors[-3000:]


def test_missing_data(data):
    data.with_suffix(".bin").unlink()
    assert_told(run_on(data), 2, f"{data}.bin does not exist", "Fix:")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_data(data, suffix):
    file = data.with_suffix(suffix)
    file.write_bytes(file.read_bytes()[:-100])
    assert_told(run_on(data), 2, f"{data}.bin" if suffix == ".bin" else str(data), "Fix:")


def test_data_of_another_vocabulary(data):
    data.with_suffix(".json").write_text(json.dumps({"format": "megatron_xmoe.data.v1", "vocab_size": 60}))
    assert_told(run_on(data), 2, "60", "64", "Fix:")


def test_a_part_without_documents(data):
    """Megatron would look for samples in it for ever."""
    assert_told(run_on(data, "--split", "90,9,1"), 2, "--split 90,9,1", "the test part", "40", "Fix:")


def test_vocabulary_of_the_checkpoint(tmp_path):
    """Megatron would resize the embeddings silently."""
    run_job(TOY, XMOE, "--train-iters", "1", "--save", str(tmp_path), "--save-interval", "1")
    loading = ["--load", str(tmp_path), "--finetune"]
    assert_told(run_job(TOY, XMOE, loading, "--vocab-size", "70", processes=2, fails=True), 2, "64", "70", "Fix:")
    other = run_job(TOY, XMOE, loading, "--num-experts", "6", processes=2, fails=True)
    assert_told(other, 2, "num_experts 12", "6", "Fix:")
    longer = run_job(TOY, XMOE, "--load", str(tmp_path), "--train-iters", "9", processes=2, fails=True)
    assert_told(longer, 2, "total number of iterations", "Fix:", "--override-opt-param-scheduler")
    shutil.rmtree(tmp_path / "iter_0000001")
    assert_told(run_job(TOY, XMOE, loading, processes=2, fails=True), 2, "no such checkpoint", "Fix:")


def test_help_explains_the_options():
    job = run_job("--help")
    text = re.sub(r"\s+", " ", job.output)
    assert "--moe-backend {megatron,xmoe}" in text
    assert "padding-free token buffers" in text
    assert "--num-experts" in text and "--moe-router-topk" in text
