"""The recipes and the Slurm files as a user starts them; their models are compared in tests/checkpoint."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import LOGGED, REPOSITORY, run_script
from recipes import NAMES, RECIPES, VARIABLES, dry_run, run_recipe, words_of

SLURM = sorted((REPOSITORY / "tools" / "slurm").glob("*.sbatch"))
SHELL_FILES = [*SLURM, *sorted(RECIPES.glob("*.sh"))]
OF_SLURM = {"WORLD_SIZE", "LOCAL_RANK"}  # set for pretrain_xmoe.py
# cut down to what a CPU does in seconds
SMALL = """--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 16 --moe-ffn-hidden-size 16
    --num-experts 8 --seq-length 32 --max-position-embeddings 32 --vocab-size 100 --make-vocab-size-divisible-by 1
    --micro-batch-size 1 --global-batch-size 4 --train-iters 2""".split()


def recorder(tmp_path: Path) -> dict[str, str]:
    """An interpreter, a Slurm and a job that only say what they were started with."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "python-stand-in": 'printf "%s\\n" "RANK=${RANK-} WORLD_SIZE=${WORLD_SIZE-} LOCAL_RANK=${LOCAL_RANK-}" "$@"',
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": 'echo node7; sleep 0.1; seq 8 9999',  # whoever stops reading early makes it fail
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:/usr/bin:/bin", "PYTHON": str(programs / "python-stand-in"), "HOME": str(tmp_path),
        "USER": "user", "SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_NNODES": "2", "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_PER_NODE": "h200:8", "SLURM_CPUS_ON_NODE": "64",
        "SLURM_PROCID": "11", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3",
    }  # fmt: skip


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_files_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (apt-get install shellcheck)")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", "-x", "-P", "SCRIPTDIR", *SHELL_FILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_users_options_come_last(name):
    words = words_of(name, "--mock-data", "--num-layers", "7", "a word with blanks")
    assert words[-4:] == ["--mock-data", "--num-layers", "7", "a word with blanks"]
    assert "--mock-data" not in words_of(name)  # never unasked


@pytest.mark.parametrize("name", NAMES)
def test_help_names_every_variable(name):
    shown = run_recipe(name, "--help")
    files = [name, "common", *(["xmoe_paper"] if name.startswith("xmoe") else [])]
    text = "".join((RECIPES / f"{file}.sh").read_text() for file in files)
    used = {variable for variable in VARIABLES if re.search(rf"\$\{{?{variable}\b", text)} - OF_SLURM
    assert shown.returncode == 0 and len(used) > 15
    assert not [variable for variable in used if variable not in shown.stdout]
    assert f"bash tools/recipes/{name}.sh --mock-data" in shown.stdout  # an example


def test_variables_change_the_command(tmp_path):
    words = words_of("qwen3_30b_a3b", TP="2", EP="16", MBS="3", GBS="96", PRECISION="fp16", BACKEND="megatron",
                     DATA_PATH="some data", TOKENIZER_TYPE="HuggingFaceTokenizer", TOKENIZER_MODEL="folder",
                     CHECKPOINTS=str(tmp_path), SAVE_INTERVAL="7", RECOMPUTE="full", SEQ_LENGTH="8192",
                     TRAIN_ITERS="9")  # fmt: skip
    line = "\n".join(words)
    for option, value in {
        "moe-backend": "megatron", "tensor-model-parallel-size": "2", "expert-model-parallel-size": "16",
        "micro-batch-size": "3", "global-batch-size": "96", "data-path": "some data", "train-iters": "9",
        "tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "folder", "save": str(tmp_path),
        "load": str(tmp_path), "save-interval": "7", "recompute-granularity": "full", "seq-length": "8192",
    }.items():  # fmt: skip
        assert f"--{option}\n{value}\n" in line, option
    assert {"--fp16", "--sequence-parallel"} <= set(words) and not {"--bf16", "--vocab-size"} & set(words)
    assert "--sequence-parallel" not in words_of("qwen3_30b_a3b")
    assert "--sequence-parallel" not in words_of("qwen3_30b_a3b", TP="2", SEQUENCE_PARALLEL="0")
    # X-MoE's own models share the tokens in the Mixture-of-Experts blocks only, which Megatron's layers cannot
    assert "--sequence-parallel" not in words_of("xmoe_large")
    assert "--sequence-parallel" in words_of("xmoe_large", BACKEND="megatron")
    assert "--sequence-parallel" in words_of("xmoe_large", SEQUENCE_PARALLEL="1")


def commands_of(page: str) -> list[str]:
    """The command lines of a page's shell blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (REPOSITORY / page).read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("line", [line for line in commands_of("docs/recipes.md") if "bash tools/recipes" in line])
def test_commands_of_the_page_start_something(line):
    done = subprocess.run(["bash", "-c", f"{line} --show"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 20, done.stderr


@pytest.mark.parametrize("variable", ["PRECISION", "RECOMPUTE"])
def test_an_unknown_value_is_one_line(variable):
    done = run_recipe("olmoe_1b_7b", "--show", **{variable: "some"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and f"{variable} is some" in done.stderr


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, ["--standalone", "--nproc-per-node", "4"]),
    ({"NNODES": "2", "MASTER_ADDR": "node7", "MASTER_PORT": "77", "SLURM_JOB_ID": "123"},
     ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "123", "--rdzv-endpoint", "node7:77", "--nproc-per-node",
      "4"]),
])  # fmt: skip
def test_torchrun_is_started(environment, expected, tmp_path):
    start = recorder(tmp_path)
    done = run_recipe("xmoe_small", "--mock-data", GPUS_PER_NODE="4", PATH=start["PATH"], PYTHON=start["PYTHON"],
                      **environment)  # fmt: skip
    words = done.stdout.splitlines()[1:]
    assert words[:2] == ["-m", "torch.distributed.run"] and words[2 : 2 + len(expected)] == expected
    assert words[2 + len(expected)] == str(REPOSITORY / "pretrain_xmoe.py") and words[-1] == "--mock-data"


def test_torchrun_sbatch_starts_the_recipe(tmp_path):
    done = subprocess.run(["bash", SLURM[1], "tools/recipes/mixtral_8x7b.sh", "--mock-data"], capture_output=True,
                          text=True, env=recorder(tmp_path))  # fmt: skip
    line = " ".join(done.stdout.split())
    assert SLURM[1].name == "torchrun.sbatch" and done.returncode == 0, done.stderr
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-id 123 --rdzv-endpoint node7:20123 --nproc-per-node 8" in line
    assert "--num-experts 8" in line and line.endswith("--mock-data")


def test_frontier_sbatch_starts_a_process_for_each_task(tmp_path):
    done = subprocess.run(["bash", SLURM[0], "tools/recipes/xmoe_small.sh", "--mock-data"], capture_output=True,
                          text=True, env=recorder(tmp_path))  # fmt: skip
    assert SLURM[0].name == "frontier.sbatch" and done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["RANK=11 WORLD_SIZE=16 LOCAL_RANK=0", str(REPOSITORY / "pretrain_xmoe.py")]
    assert lines[-1] == "--mock-data" and "AWS_OFI_RCCL is not set" in done.stderr


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.name)
def test_every_exported_variable_is_explained(path):
    """The line before an export is a comment, or the assignment of the same variable, with a comment before it."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    exports = [(number, line) for number, line in enumerate(lines) if line.startswith("export ")]
    assert len(exports) >= 5
    for number, line in exports:
        name = re.match(r"export (\w+)", line)[1]
        before = lines[number - 1] if not lines[number - 1].startswith(f"{name}=") else lines[number - 2]
        assert before.startswith("#") and len(before) > 20, f"{path.name} does not explain {name}"
    assert "Unverified" in path.read_text()


def test_dry_run_from_the_shell():
    done = run_recipe("xmoe_medium", "--dry-run", "--memory-limit", "0", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "parameters: 59583708160"


def test_a_layout_that_cannot_be_is_one_line():
    job = run_script(REPOSITORY / "tools" / "dry_run.py", *words_of("xmoe_medium", "--dry-run", GPUS="48"), fails=True)
    assert job.returncode == 2 and not job.output
    assert "expert x expert-tensor x pipeline parallel size, 64" in job.errors.splitlines()[-1]


def test_a_rank_that_fits_is_built_for_real():
    """Rank 3 of 16 with weights, gradients and optimizer; the estimate is not above what they took."""
    small = ("--num-layers", "2", "--num-experts", "8", "--vocab-size", "20000")
    result = dry_run("xmoe_small", *small, memory_limit=2, GPUS="16", RANK="3")
    assert result.lines[0].startswith("rank 3 of 16: ") and "experts over 8 ranks, 2 replica(s)" in result.lines[0]
    taken = float(re.search(r"built with real tensors: ([0-9.]+) GiB", result.lines[0])[1])
    memory = dict(re.findall(r"(weights|gradients|optimizer states) ([0-9.]+)", "\n".join(result.lines)))
    weights, gradients = float(memory["weights"]), float(memory["gradients"])
    assert weights + gradients <= taken <= 2 * (weights + gradients)
    without = dry_run("xmoe_small", *small, GPUS="16", RANK="3")
    assert "tensors without values" in without.lines[0] and without.lines[1:] == result.lines[1:]


def test_the_last_stage_has_the_output_layer():
    first, last = (dry_run("deepseek_v3", RANK=rank).parts for rank in ("0", "2047"))
    assert first["output layer"][0] == 0 < last["output layer"][0] == last["output layer"][1]
    assert last["embedding"][0] == 0 < first["embedding"][0]
    assert last["experts"][0] == first["experts"][0]  # one layer, of which the first stage's is the fourth
    assert last["dense FFN"][0] == 0 < first["dense FFN"][0] == first["dense FFN"][1]


def test_an_interleaved_pipeline_keeps_more_micro_batches():
    """Rank 12 of 16, the last of four stages: one micro-batch, or of four chunks 3 * 4 passes and one more."""
    layout = dict(GPUS="16", PP="4", EP="4", GBS="64", RANK="12")
    plain, interleaved = (
        float(re.search(r"activations ([0-9.]+)", "\n".join(dry_run("olmoe_1b_7b", *options, **layout).lines))[1])
        for options in ((), ("--num-layers-per-virtual-pipeline-stage", "1"))
    )
    head = 4096 * (4 * 50304 + 2 * 2 * 2048) / 2**30  # the loss and the last norm, once
    assert (interleaved - head) / (plain - head) == pytest.approx(13 / 4, rel=0.01)


def test_a_recipe_trains():
    done = run_recipe("xmoe_small", "--mock-data", *SMALL, EP="1", GPUS_PER_NODE="1", PYTHON=sys.executable,
                      OMP_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int(iteration) for iteration, _, _ in LOGGED.findall(done.stdout)] == [1, 2]
    assert "backend      xmoe (XMoELayer) for 8 experts, top-6" in done.stdout
