"""Every shell block of the README that this machine can run, in order, in a fresh clone, in one shell."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from jobs import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
# what a block may need, in its first line, and whether it is here
NEEDS = {
    r"(\d+) GPUs": lambda number: torch.cuda.is_available() and torch.cuda.device_count() >= int(number),
    r"2 nodes of 8 GPUs": lambda: False,
    r"Slurm": lambda: shutil.which("sbatch") is not None,
}


def blocks() -> list[str]:
    """The README's shell blocks."""
    return re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def fits(block: str) -> bool:
    """Whether this machine has what the block says it needs; a need that no rule knows is an error."""
    need = re.match(r"# needs: (.*)\n", block)
    if need is None:
        return True
    for pattern, here in NEEDS.items():
        if match := re.fullmatch(pattern, need[1]):
            return here(*match.groups())
    raise AssertionError(f"tests know no rule for '# needs: {need[1]}'")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tracked files as they are now, and nothing else."""
    folder = tmp_path_factory.mktemp("fresh") / "clone"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a new user: an environment of their own, to which this one's packages look installed already."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True,
                         text=True, check=True).stdout.strip()  # fmt: skip
    # a path file, and not PYTHONPATH: what the blocks install comes first. Path files there are not read again, so
    # this environment's own megatron_xmoe stays unknown.
    (Path(own) / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in ("pip", "torchrun"):
        module = {"pip": "pip", "torchrun": "torch.distributed.run"}[name]
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{python}" -m {module} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XMOE_", "MEGATRON_", "PYTHON"))}
    return kept | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(folder),
        "OMP_NUM_THREADS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's word for: without isolation, so without a download
    }


def test_blocks_in_order(clone, environment):
    wanted = [block for block in blocks() if fits(block)]
    marked = [f"echo '@@ block {number}'\n{block}" for number, block in enumerate(wanted)]
    script = "\n".join(["set -euo pipefail", *marked])
    with open(clone.parent / "log", "w+") as log:
        job = subprocess.run(["bash", "-c", script], cwd=clone, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                             stderr=subprocess.STDOUT, timeout=1800)  # fmt: skip
        log.seek(0)
        told = log.read()
    assert job.returncode == 0, told[-6000:]
    reached = [int(number) for number in re.findall(r"^@@ block (\d+)$", told, re.MULTILINE)]
    assert reached == list(range(len(wanted)))
    assert len(wanted) >= 8
    for left in ("runs/quickstart/quickstart.html", "demo/run.html", "demo/qwen3-again/config.json"):
        assert (clone / left).stat().st_size > 0
    assert "tensors, 0 differ" in told and "parameters: 6919161856" in told
    assert told.count("Once upon a time") >= 1


def test_needs_are_known():
    assert sum("# needs:" in block for block in blocks()) == 3
    for block in blocks():
        fits(block)
    with pytest.raises(AssertionError, match="a tape robot"):
        fits("# needs: a tape robot\nfetch\n")
