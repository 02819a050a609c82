"""Every shell block of the README that this machine can run, in order, in a fresh clone, in one shell."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from jobs import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
NEVER_HERE = r"2 nodes of 8 GPUs|Slurm"  # a test queues no jobs, not even where it could
SECONDS = 1500


def blocks() -> list[str]:
    """The README's shell blocks."""
    return re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def fits(block: str) -> bool:
    """Whether this machine has what the block's first line says it needs; a need that no rule knows is an error."""
    need = re.match(r"# needs: (.*?)(?: \(not run yet.*\))?\n", block)
    if need is None:
        return True
    if gpus := re.fullmatch(r"(\d+) GPUs", need[1]):
        return torch.cuda.is_available() and torch.cuda.device_count() >= int(gpus[1])
    assert re.fullmatch(NEVER_HERE, need[1]), f"tests know no rule for '# needs: {need[1]}'"
    return False


def other_versions() -> list[str]:
    """Packages of constraints.txt that are here in another version, which the first block would replace."""
    found = []
    for name, wanted in re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE):
        try:
            if version(name).split("+")[0] != wanted:
                found.append(f"{name} {version(name)} instead of {wanted}")
        except PackageNotFoundError:
            pass  # not needed on this machine, or the first block says what is missing
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tracked files as they are now, and nothing else."""
    folder = tmp_path_factory.mktemp("fresh") / "clone"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a new user: an environment of their own, to which this one's packages look installed already.

    pip installs into it alone, and downloads nothing.
    """
    if differing := other_versions():
        pytest.skip(f"the README's first block would install other versions: {', '.join(differing)}")
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True,
                         text=True, check=True).stdout.strip()  # fmt: skip
    # A path file, and not PYTHONPATH: what the blocks install comes first. Path files of the folders that it names are
    # not read, so this environment's own megatron_xmoe stays unknown.
    libraries = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (Path(own) / "tests.pth").write_text("".join(f"{library}\n" for library in libraries))
    # a user's pip builds this package where there is no torch, so without kernels
    pip = f'XMOE_BUILD_EXT=0 exec "{python}" -m pip "$@" --no-build-isolation --no-index'
    for name, command in {"pip": pip, "torchrun": f'exec "{python}" -m torch.distributed.run "$@"'}.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / "bin" / name).chmod(0o755)
    foreign = ("XMOE_", "MEGATRON_", "PYTHON", "PIP_", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(folder),
        "PIP_USER": "0",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def run(script: str, folder: Path, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit code of a bash script, None where it took too long, and what it wrote; nothing that it started stays."""
    with open(folder.parent / "log", "w+") as log:
        job = subprocess.Popen(["bash", "-c", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                               stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            code = job.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
        log.seek(0)
        return code, log.read()


def test_blocks_in_order(clone, environment):
    wanted = [block for block in blocks() if fits(block)]
    marked = [f"echo '@@ block {number}'\n{block}" for number, block in enumerate(wanted)]
    code, told = run("\n".join(["set -euo pipefail", *marked]), clone, environment)
    assert code == 0, told[-6000:]
    reached = [int(number) for number in re.findall(r"^@@ block (\d+)$", told, re.MULTILINE)]
    assert reached == list(range(len(wanted)))
    assert len(wanted) >= 8
    for left in ("runs/quickstart/quickstart.html", "demo/run.html", "demo/qwen3-again/config.json"):
        assert (clone / left).stat().st_size > 0
    assert "tensors, 0 differ" in told and "parameters: 6919161856" in told
    assert [line for line in told.splitlines() if line.startswith("def ")]  # the completion


def test_needs_are_known():
    assert sum("# needs:" in block for block in blocks()) == 3
    assert not all(map(fits, blocks()))
    with pytest.raises(AssertionError, match="a tape robot"):
        fits("# needs: a tape robot\nfetch\n")
