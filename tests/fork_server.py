"""Runs pretrain_xmoe.py in processes that start with everything imported: a server that forks, and its client.

A start of the program costs seconds of imports in every process; a fork of a process that has them costs none. Each
run is a new process that executes the real script as __main__, so nothing of one run is left for the next. The server
has one thread and no accelerator, which is what makes forking safe.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

TESTS = Path(__file__).resolve().parent
SECONDS_TO_END = 5.0  # what a run's other processes get once one of them has failed
PRELOADED = """
    megatron.training.checkpointing megatron_xmoe.backend megatron_xmoe.metrics megatron_xmoe.training.arguments
    megatron_xmoe.training.checks megatron_xmoe.training.defaults megatron_xmoe.training.gpt_step
    megatron_xmoe.training.main megatron_xmoe.training.options megatron_xmoe.training.report
    megatron_xmoe.training.setup
    megatron.core.tokenizers.text.libraries
    torch.distributed.checkpoint.format_utils
""".split()


class Client:
    """The server as its user sees it: started with the first run, ended with this process."""

    def __init__(self) -> None:
        self._server: subprocess.Popen | None = None

    def run(self, script: Path, argv: list[str], processes: int, directory: Path, timeout: float,
            environment: dict[str, str], recorder: str | None) -> int:  # fmt: skip
        """Run `script` in several processes and wait; their output is in files `out.RANK` and `err.RANK`.

        Args:
            recorder: if given, tests/recorder.py writes what was trained to this directory.

        Returns:
            0, or the exit code of the first process that failed; its kin are ended as torchrun does it.

        Raises:
            TimeoutError: the run was not done in time; its processes are killed.
        """
        request = {"script": str(script), "argv": argv, "processes": processes, "directory": str(directory),
                   "timeout": timeout, "environment": environment, "recorder": recorder}  # fmt: skip
        server = self._start()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            self._server = None
            raise RuntimeError(f"the fork server ended with exit code {server.wait()}")
        code = json.loads(answer)["returncode"]
        if code is None:
            raise TimeoutError(f"{argv} was not done after {timeout} s")
        return code

    def _start(self) -> subprocess.Popen:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(TESTS / "fork_server.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
            )
            atexit.register(self.close)
        return self._server

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()
            self._server = None


def serve() -> None:
    """Answer requests, a line of JSON each, until standard input ends."""
    _preload()
    for line in sys.stdin:
        request = json.loads(line)
        ranks = _fork(request)
        print(json.dumps({"returncode": _wait(ranks, time.monotonic() + request["timeout"])}), flush=True)


def _preload() -> None:
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import harness

    harness.install_platform()
    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose a thread"
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page it looks at


def _fork(request: dict) -> dict[int, int]:
    """Start the processes of a run: {process id: rank}."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {}
    for rank in range(request["processes"]):
        process = os.fork()
        if process == 0:
            _run(rank, port, request)
        ranks[process] = rank
    return ranks


def _wait(ranks: dict[int, int], deadline: float) -> int | None:
    """Exit code of the run, None if it had to be killed at the deadline."""
    first_failure, signalled = 0, False
    while ranks:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            if time.monotonic() > deadline:
                for running in ranks:
                    os.kill(running, signal.SIGKILL)
                    os.waitpid(running, 0)
                return first_failure or None
            select.select([], [], [], 0.01)
            continue
        if ranks.pop(process, None) is None:
            continue
        code = os.waitstatus_to_exitcode(status)
        first_failure = first_failure or code
        if code and not signalled:
            signalled, deadline = True, min(deadline, time.monotonic() + SECONDS_TO_END)
            for running in ranks:
                os.kill(running, signal.SIGTERM)
    return first_failure


def _run(rank: int, port: int, request: dict) -> NoReturn:
    """Make a forked process what a launcher would have started, and end it with its run."""
    directory = Path(request["directory"])
    for descriptor, path in ((0, Path(os.devnull)), (1, directory / f"out.{rank}"), (2, directory / f"err.{rank}")):
        file = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["processes"]),
                      LOCAL_WORLD_SIZE=str(request["processes"]), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    os.environ.update(request["environment"])
    sys.argv = [request["script"], *request["argv"]]
    sys.path.insert(0, os.path.dirname(request["script"]))
    if request["recorder"]:
        import recorder

        recorder.install(Path(request["recorder"]), rank)
    code = 1
    try:
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    # what the interpreter does at its end, without taking thousands of modules apart
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
