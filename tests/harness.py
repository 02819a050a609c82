"""Processes and process groups for tests, and memory in which an element that nothing wrote is noticed.

Importing this module imports nothing of Megatron: the CPU platform has to be installed before.
"""

import faulthandler
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

_LAYOUTS = itertools.count()


def run_distributed(function: Callable, world_size: int, *args, timeout: float = 120) -> list[Any]:
    """Run `function(*args)` in `world_size` new processes with a gloo world and without GPUs.

    Args:
        function: at module level; its module is imported once the CPU platform is in place.
        args: pickled.
        timeout: seconds for all of it.

    Returns:
        What each rank returned, by rank.

    Raises:
        RuntimeError: a rank raised (the message holds the first rank's traceback) or died.
        TimeoutError: names the ranks that were not done in time.
    """
    context = multiprocessing.get_context("spawn")
    task = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as directory:
        processes, connections = [], []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                target = (rank, world_size, os.path.join(directory, "store"), theirs, task)
                processes.append(context.Process(target=_rank_main, args=target, daemon=True))
                processes[-1].start()
                theirs.close()
                connections.append(ours)
            return _collect(connections, processes, time.monotonic() + timeout, timeout)
        finally:
            for connection in connections:
                connection.close()
            for process in processes:
                process.kill()
                process.join()


def _collect(connections: list[Connection], processes: list, deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        running = {connections[rank]: rank for rank in range(len(connections)) if rank not in results}
        ready = wait(running, max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = sorted(running.values())
            for rank in ranks:
                os.kill(processes[rank].pid, signal.SIGUSR1)
                time.sleep(0.2)  # one stack after the other
            raise TimeoutError(f"ranks {ranks} were not done after {timeout} s; standard error has their stacks")
        reports = [(running[connection], *_receive(connection)) for connection in ready]
        failures = [(when, rank, text) for rank, failed, when, text in reports if failed]
        if failures:
            _, rank, text = min(failures)
            if text is None:
                processes[rank].join(5)
                text = f"it ended without a result, exit code {processes[rank].exitcode}"
            raise RuntimeError(f"rank {rank} of {len(connections)} failed:\n{text}")
        results |= {rank: pickle.loads(content) for rank, _, _, content in reports}
    return [results[rank] for rank in range(len(connections))]


def _receive(connection: Connection) -> tuple[bool, float, Any]:
    """Whether the rank failed, when, and its result or traceback (None if it died)."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return True, float("inf"), None  # a death is often the consequence of another rank's failure


def _rank_main(rank: int, world_size: int, store: str, connection: Connection, task: bytes) -> None:
    faulthandler.register(signal.SIGUSR1)
    try:
        result = _run_rank(rank, world_size, store, task)
        report = (False, time.time(), pickle.dumps(result))
    except BaseException:
        report = (True, time.time(), traceback.format_exc())
    with suppress(BrokenPipeError):  # another rank failed, and nobody listens any more
        connection.send(report)
        # a rank that left now would break the connections of ranks that are still at work
        wait([connection])
    os._exit(0)


def _run_rank(rank: int, world_size: int, store: str, task: bytes) -> Any:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    install_platform()
    function, args = pickle.loads(task)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    with poisoned_memory():
        return function(*args)


def install_platform() -> None:
    """Put megatron_xmoe's stand-ins in place for a machine without an accelerator, and its repairs of the wheel."""
    warnings.filterwarnings("ignore", message=".*([Aa]pex|[Tt]ransformer.[Ee]ngine|absl).*")
    from megatron_xmoe.platform import cpu, multi_tensor, wheel

    assert "megatron" not in sys.modules, "the stand-ins must be in place before Megatron is imported"
    if cpu.needed():
        cpu.install()
    wheel.install()
    multi_tensor.install()


@contextmanager
def single_process() -> Iterator[None]:
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def model_parallel(
    tp: int = 1, ep: int = 1, pp: int = 1, etp: int = 1, seed: int = 1234, order: str = "tp-cp-ep-dp-pp"
) -> Iterator[None]:
    """Megatron's process groups and random states for a layout; the next layout can follow in the same processes.

    Args:
        tp: tensor, `ep`: expert, `pp`: pipeline, `etp`: expert-tensor parallel size.
        seed: of Megatron's random states.
        order: of the dimensions, from that in which neighbouring ranks differ.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    groups = dist.distributed_c10d._world.pg_map
    others = set(groups)
    # torch names a group that only its members make by its ranks: so a later layout's has the name of one that is gone,
    # whose members' addresses are still in the store
    backend, store = groups[dist.group.WORLD]
    groups[dist.group.WORLD] = backend, dist.PrefixStore(f"layout {next(_LAYOUTS)}", store)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        order=order,
    )
    try:
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        # Megatron only forgets its groups: dozens a layout, with sockets and threads of their own
        for group in [group for group in groups if group not in others]:
            dist.destroy_process_group(group)
        groups[dist.group.WORLD] = backend, store


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, or with a huge number for integers."""
    places = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, _poisoning(getattr(owner, name))))
        yield


def _poisoning(allocate: Callable) -> Callable:
    @functools.wraps(allocate)  # also keeps the mark of a stand-in of the CPU platform
    def poisoned(*args, **kwargs):
        result = allocate(*args, **kwargs)
        if result.dtype.is_floating_point or result.dtype.is_complex:
            poison = float("nan")
        elif result.dtype == torch.bool:
            return result
        else:
            poison = torch.iinfo(result.dtype).max // 2
        with torch.no_grad():
            return result.fill_(poison)

    return poisoned
