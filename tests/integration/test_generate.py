"""Completions of a trained checkpoint are the same with either backend and in any layout, and what was asked for."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from jobs import REPOSITORY, run_job, run_script
from option_cases import MODEL, TRAINING

PROMPT = "7 11 13"
SCRIPT = REPOSITORY / "tools" / "generate.py"
ROUTER = (
    "--moe-router-score-function sigmoid --moe-router-num-groups 4 --moe-router-group-topk 2 "
    "--moe-router-topk-scaling-factor 2.5 --moe-router-enable-expert-bias --moe-shared-expert-gate "
    "--moe-router-dtype fp32 --moe-shared-expert-intermediate-size 16 --moe-expert-capacity-factor 1.0 "
    "--moe-router-load-balancing-type none --xmoe-min-capacity 2 --mtp-num-layers 1"
).split()  # what --use-checkpoint-args would forget; and training drops, but completing does not


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Trained by X-MoE at EP2."""
    directory = tmp_path_factory.mktemp("trained")
    run_job(MODEL, TRAINING, ROUTER, "--mock-data", "--moe-backend", "xmoe", "--expert-model-parallel-size", "2",
            "--save", str(directory), "--save-interval", "10", processes=2)  # fmt: skip
    return directory


def generate(checkpoint, *options, processes=1, fails=False):
    return run_script(SCRIPT, "--load", checkpoint, "--prompt", PROMPT, "--tokens", "--max-new-tokens", "12", *options,
                      processes=processes, fails=fails)  # fmt: skip


def tokens(job) -> list[int]:
    (line,) = job.output.splitlines()  # only rank 0 prints, and nothing else
    return json.loads(line)


@pytest.fixture(scope="module")
def greedy(checkpoint):
    return tokens(generate(checkpoint, "--temperature", "0"))


def test_greedy_is_stock_megatrons(checkpoint, greedy):
    assert greedy[:3] == [7, 11, 13] and len(greedy) == 15 and len(set(greedy)) > 3
    assert all(0 <= token < 60 for token in greedy)
    assert tokens(generate(checkpoint, "--temperature", "0", "--moe-backend", "megatron")) == greedy


@pytest.mark.parametrize(
    "layout",
    [
        "--expert-model-parallel-size 2",
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2",
        pytest.param("", marks=pytest.mark.slow),
    ],
)
def test_layouts(checkpoint, greedy, layout):
    assert tokens(generate(checkpoint, "--temperature", "0", *layout.split(), processes=2)) == greedy


def test_sampling(checkpoint, greedy):
    hot = ["--temperature", "5"]
    drawn = tokens(generate(checkpoint, *hot, "--seed", "1"))
    assert drawn != greedy and drawn == tokens(generate(checkpoint, *hot, "--seed", "1"))
    assert drawn != tokens(generate(checkpoint, *hot, "--seed", "2"))
    assert tokens(generate(checkpoint, *hot, "--top-k", "1")) == greedy


def test_prompt_and_text(checkpoint, greedy):
    job = run_script(SCRIPT, "--load", checkpoint, "--prompt", PROMPT, "--prompt", "1", "--temperature", "0",
                     "--max-new-tokens", "12", "--ckpt-step", "10")  # fmt: skip
    first, second = job.output.splitlines()
    assert first.split() == list(map(str, greedy)) and second.split()[0] == "1"
    assert "arguments" not in job.errors and f"generate.py: loading {checkpoint}" in job.errors


def test_messages(checkpoint, capfd, tmp_path):
    assert "end of arguments" in generate(checkpoint, "--max-new-tokens", "1", "--verbose").errors
    from tools.generate import messages_kept_back

    log = tmp_path / "log"

    def write(text, error=None):
        with messages_kept_back(str(log), ValueError):
            os.system(f"echo {text}; echo {text} >&2")
            if error:
                raise error

    write("all is well")
    with pytest.raises(ValueError):
        write("told", ValueError("in one line"))
    assert capfd.readouterr() == ("", "") and not log.exists()
    with pytest.raises(RuntimeError):
        write("this failed", RuntimeError("no memory"))
    assert capfd.readouterr() == ("", f"this failed\nthis failed\nAll messages: {log}\n")


@pytest.mark.parametrize(
    "options, parts",
    [
        ("--pipeline-model-parallel-size 2", ["pipeline", "Fix:"]),
        ("--moe-expert-capacity-factor 1", ["--moe-expert-capacity-factor", "Fix:"]),
        ("--top-p 0", ["--top-p"]),
        ("--ckpt-step 9", ["iter_0000009", "Fix:"]),
    ],
)
def test_what_cannot_work(checkpoint, options, parts):
    job = generate(checkpoint, *options.split(), processes=1 + options.startswith("--pipeline"), fails=True)
    assert job.returncode != 0 and not job.output
    (line, *_) = [line for line in job.errors.splitlines() if "generate.py: error" in line]
    assert all(part in line for part in parts)


def test_sample_draws_from_the_best():
    from tools.generate import sample

    logits = torch.tensor([0.5, 0.15, 0.25, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(temperature=1.0, top_k=0, top_p=1.0):
        options = SimpleNamespace(temperature=temperature, top_k=top_k, top_p=top_p)
        return [int(sample(logits, options, generator)) for _ in range(400)]

    assert set(drawn(temperature=0)) == {0}
    assert set(drawn()) == {0, 1, 2, 3}
    assert set(drawn(top_k=2)) == {0, 2}
    assert set(drawn(top_p=0.5)) == {0} and set(drawn(top_p=0.51)) == {0, 2}
    assert set(drawn(top_k=3, top_p=0.8)) == {0, 2}
    shares = [drawn().count(token) / 400 for token in range(4)]
    assert all(abs(share - expected) < 0.12 for share, expected in zip(shares, [0.5, 0.15, 0.25, 0.1], strict=True))
    assert drawn(temperature=0.2).count(0) > 380
