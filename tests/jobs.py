"""Runs of the real pretrain_xmoe.py in processes of their own, and what they logged and saved."""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from fork_server import Client

REPOSITORY = Path(__file__).resolve().parents[1]
NUMBER = r"([-+0-9.E]+|nan|inf)"
LOGGED = re.compile(rf"iteration +(\d+)/ .*? lm loss: {NUMBER} .*? grad norm: {NUMBER}")

# fp32, six layers (two of them dense), twelve small experts, a shared expert, both auxiliary losses; each global batch
# divides by 1, 2, 3 and 4 data-parallel ranks
MODEL = """
    --num-layers 6 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --ffn-hidden-size 48 --seq-length 16 --max-position-embeddings 16 --swiglu --normalization RMSNorm
    --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
    --num-experts 12 --moe-router-topk 3 --moe-ffn-hidden-size 16 --moe-layer-freq [0,1,1,0,1,1]
    --moe-shared-expert-intermediate-size 16 --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3
""".split()
TRAINING = """
    --micro-batch-size 1 --global-batch-size 12 --lr 1e-3 --seed 7 --log-interval 1 --eval-iters 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 64 --make-vocab-size-divisible-by 1
""".split()
TOY = MODEL + TRAINING


@dataclass
class Job:
    """One finished run."""

    returncode: int
    output: str
    errors: str

    @property
    def losses(self) -> dict[int, float]:
        """Iteration -> loss, as the console shows them (seven digits)."""
        return {int(i): float(loss) for i, loss, _ in LOGGED.findall(self.output)}

    @property
    def grad_norms(self) -> dict[int, float]:
        """Iteration -> gradient norm."""
        return {int(i): float(norm) for i, _, norm in LOGGED.findall(self.output)}

    def told(self) -> list[str]:
        """The lines in which our process tells an error."""
        return [line for line in self.errors.splitlines() if "pretrain_xmoe.py: error" in line]


def run_job(
    *arguments: str | list[str],
    processes: int = 1,
    timeout: int = 300,
    fails: bool = False,
    torchrun: bool = False,
    recorder: Path | None = None,
    **environment: str,
) -> Job:
    """Run pretrain_xmoe.py and wait for it; a failure that was not expected shows the log.

    Args:
        torchrun: start it as a user does, and not from the fork server, which saves the imports.
        recorder: directory in which tests/recorder.py keeps what was trained (only without torchrun).
        environment: variables for its processes.
    """
    flat = [part for argument in arguments for part in ([argument] if isinstance(argument, str) else argument)]
    if torchrun or torch.cuda.is_available():  # a fork would inherit the CPU platform
        assert recorder is None, "only the fork server's processes can record"
        job = _under_torchrun(flat, processes, timeout, environment)
    else:
        job = _forked(flat, processes, timeout, environment, recorder)
    assert fails or job.returncode == 0, f"{flat}\n{job.output[-1500:]}\n{job.errors[-6000:]}"
    return job


def run_script(
    script: Path, *arguments: str | Path, processes: int = 1, timeout: int = 300, fails: bool = False
) -> Job:
    """Run another program that uses Megatron, in processes of the fork server; a failure shows the log."""
    job = _forked([str(argument) for argument in arguments], processes, timeout, {}, None, script)
    assert fails or job.returncode == 0, f"{script.name} {arguments}\n{job.output[-1500:]}\n{job.errors[-6000:]}"
    return job


_server = Client()


def _forked(
    arguments: list[str],
    processes: int,
    timeout: int,
    environment: dict[str, str],
    recorder: Path | None,
    script: Path = REPOSITORY / "pretrain_xmoe.py",
) -> Job:
    with tempfile.TemporaryDirectory() as directory:
        code = _server.run(script, arguments, processes, Path(directory), timeout,
                           environment, recorder and str(recorder))  # fmt: skip
        texts = {
            kind: "".join((Path(directory) / f"{kind}.{rank}").read_text() for rank in range(processes))
            for kind in ("out", "err")
        }
        return Job(code, texts["out"], texts["err"])


def _under_torchrun(arguments: list[str], processes: int, timeout: int, environment: dict[str, str]) -> Job:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(REPOSITORY / "pretrain_xmoe.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return Job(done.returncode, done.stdout, done.stderr)


def start_from(checkpoint: Path) -> list[str]:
    """Options that start a run from the weights of a checkpoint, at iteration 0, whatever layout saved it."""
    return f"--load {checkpoint} --finetune --no-load-optim --no-load-rng --ckpt-format torch_dist".split()


def relative_difference(job: Job, reference: Job) -> float:
    """Largest relative difference of the losses; both runs must have logged the same, non-empty iterations."""
    assert reference.losses and job.losses.keys() == reference.losses.keys()
    return max(abs(job.losses[i] - loss) / abs(loss) for i, loss in reference.losses.items())


def saved_tensors(directory: Path, iteration: int) -> dict[str, torch.Tensor]:
    """All tensors of a torch_dist checkpoint, whole, by their name on disk."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = directory / f"whole_{iteration}.pt"
    dcp_to_torch_save(directory / f"iter_{iteration:07d}", whole)
    return _flatten(torch.load(whole, weights_only=False))


def _flatten(tree: object, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {name: tensor for key, value in items for name, tensor in _flatten(value, f"{prefix}/{key}").items()}
