"""What the start-up block says, and that both backends train."""

import pytest
from jobs import TOY, run_job, saved_tensors

from megatron_xmoe.kernels.registry import choose_kernels

RUN = "--train-iters 2 --expert-model-parallel-size 2".split()


def test_start_up_block():
    job = run_job(TOY, RUN, "--moe-backend", "xmoe", processes=2, torchrun=True)
    assert job.output.count("backend      xmoe (XMoELayer) for 12 experts, top-3") == 1  # on rank 0 only
    for part in (
        "dispatcher   alltoall",
        f"kernels      {choose_kernels('auto', 'cpu').name}: ",
        "experts      grouped; matrix products loop: a product per expert",
        "weight gradients added to main_grad",
        "nodes        1 with 2 process(es)",
        "groups       expert 2, rank 0 with [0, 1]",
        "--moe-token-dispatcher-type alltoall",
        "--transformer-impl local  (Transformer Engine:",
    ):
        assert part in job.output, part


@pytest.mark.parametrize("backend", ["megatron", "xmoe"])
def test_ranks_start_with_experts_of_their_own(backend, tmp_path):
    """Each expert-parallel rank draws its experts from a random state of its own."""
    run_job(TOY, "--moe-backend", backend, "--expert-model-parallel-size", "2", "--train-iters", "1", "--lr", "0",
            "--save", str(tmp_path), "--save-interval", "1", "--no-save-optim", processes=2)  # fmt: skip
    weights = saved_tensors(tmp_path, 1)
    matrices = [weight for name, weight in weights.items() if ".mlp.experts" in name and name.endswith("weight")]
    assert len(matrices) == 2 * 4 and all(len(matrix) == 12 for matrix in matrices)
    for matrix in matrices:
        assert len({tuple(expert.flatten()[:8].tolist()) for expert in matrix}) == 12


@pytest.mark.parametrize("backend, why", [("xmoe", "Megatron's shared experts have"), ("megatron", "experts with")])
def test_biases_are_switched_off_and_said(backend, why):
    """Where they cannot be, and in Megatron's experts without Transformer Engine, which do not train with biases."""
    with_biases = [part for part in TOY if part != "--disable-bias-linear"]
    job = run_job(with_biases, RUN, "--moe-backend", backend, processes=2)
    assert f"set for you  --disable-bias-linear  ({why}" in job.output
    assert len(job.losses) == 2


def test_options_of_a_checkpoint_are_refused_like_given_ones(tmp_path):
    """--use-checkpoint-args brings options that the command line does not show."""
    run_job(TOY, "--moe-grouped-gemm", "--train-iters", "1", "--save", str(tmp_path), "--save-interval", "1")
    loading = ["--use-checkpoint-args", "--load", str(tmp_path), "--finetune", "--train-iters", "1"]
    refused = run_job(TOY, loading, "--moe-backend", "xmoe", fails=True)
    assert refused.returncode != 0
    assert "--moe-grouped-gemm" in refused.told()[0] and "Fix:" in refused.told()[0]


def test_an_error_in_the_middle_of_training_shows_its_traceback(tmp_path):
    """Only what comes before the first forward pass is told in one line."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "original = torch.nn.functional.scaled_dot_product_attention\n"
        "def failing(*args, **kwargs): raise RuntimeError('attention broke')\n"
        "torch.nn.functional.scaled_dot_product_attention = failing\n"
    )
    job = run_job(TOY, RUN, "--moe-backend", "xmoe", processes=2, fails=True, torchrun=True,
                  PYTHONPATH=str(tmp_path))  # fmt: skip
    assert job.returncode != 0
    assert "attention broke" in job.told()[0] and "in forward_step" in job.errors


def test_stock_backend():
    job = run_job(TOY, RUN, processes=2)
    assert "backend      megatron (MoELayer, alltoall dispatcher)" in job.output
    assert len(job.losses) == 2


def test_layers_of_a_given_spec():
    """Megatron's own seam, which needs none of our options."""
    spec = ["megatron_xmoe.specs", "xmoe_decoder_block_spec"]
    job = run_job(TOY, RUN, "--spec", *spec, processes=2)
    assert f"megatron, with the layers of --spec {' '.join(spec)}" in job.output
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
