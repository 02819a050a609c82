"""From the command line to Megatron's training loop."""

import logging
import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable

from megatron_xmoe.platform import cpu, wheel
from megatron_xmoe.training.errors import UsageError, is_users, one_line


def main(program_start: float) -> int:
    """Run `pretrain_xmoe.py`; returns the exit code. What a user caused is one line on standard error."""
    _quieten()
    try:
        alone_without_launcher()
        on_cpu = cpu.needed()
        stand_ins = cpu.install() if on_cpu else []
        if on_cpu:  # it fears for a GPU's random numbers, once a parameter
            logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
        repairs = wheel.install()
        job = prepare(on_cpu, len(stand_ins), len(repairs))
    except Exception as error:  # ranks share nothing yet: each fails for itself, and all for the same reason
        return _fail(error, before_training=True)
    try:
        job(program_start)
    except Exception as error:
        from megatron_xmoe.training.gpt_step import training_has_begun

        code = _fail(error, before_training=not training_has_begun())
        # leave at once: a normal exit would wait in collectives for ranks that are still training
        for child in multiprocessing.active_children():  # Megatron's checkpoint writers
            child.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return 0


def prepare(on_cpu: bool, stand_ins: int, repairs: int, run: Callable | None = None) -> Callable[[float], None]:
    """Parse, adjust and check the command line, and set Megatron up with the chosen backend.

    Args: whether the run is on a CPU; numbers of symbols replaced for that, and of repairs, for the start-up block;
        `run`, what is done with (configuration, start time) instead of training.

    Returns:
        A function of the program's start time that runs the training.

    Raises:
        UsageError: something of the user's that cannot work.
    """
    from megatron.training import get_args
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    from megatron_xmoe.training.arguments import parse
    from megatron_xmoe.training.data_checks import check_data
    from megatron_xmoe.training.setup import settle, use_backend

    if not on_cpu:
        check_devices()
    adjustments = settle(*parse(), on_cpu)
    args = get_args()
    check_data(args, args.xmoe_vocab_size)
    model_config = gpt_config_from_args(args)
    use_backend(model_config, adjustments, stand_ins, repairs)
    container = pretrain_cfg_container_from_args(args, model_config)
    return lambda program_start: (run or _train)(container, program_start)


def _train(container, program_start: float) -> None:
    import torch.distributed as dist
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps

    from megatron_xmoe.training.gpt_step import datasets_provider, forward_step

    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    pretrain(container, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    if dist.is_initialized():
        dist.destroy_process_group()


def _fail(error: Exception, before_training: bool) -> int:
    """Print an error: one line for what a user caused, the traceback as well for anything else."""
    rank = os.environ.get("RANK", "0")
    hint = ""
    if os.environ.get("XMOE_TRACEBACK") == "1" or not is_users(error, before_training):
        traceback.print_exception(error)
    elif not isinstance(error, UsageError):
        hint = " (XMOE_TRACEBACK=1 shows where it was raised)"
    print(f"pretrain_xmoe.py: error (rank {rank}): {one_line(error)}{hint}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, UsageError) else 1


def alone_without_launcher() -> None:
    """Started without torchrun: one process, with a free port of its own.

    Raises:
        UsageError: Slurm started several tasks without telling them their ranks.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks > 1:
        raise UsageError(
            f"Slurm runs {tasks} tasks, but RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are not set. "
            "Fix: set them from SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, or start torchrun"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def check_devices() -> None:
    """Every process needs a GPU of its own; Megatron takes the one of its LOCAL_RANK.

    Raises:
        UsageError: this machine has fewer GPUs than processes; on each of them, so that none waits for the others.
    """
    import torch

    found, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if processes > found:
        raise UsageError(
            f"{processes} processes on this machine, and torch finds {found} GPU(s). Fix: --nproc-per-node {found}, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


def _quieten() -> None:
    """Megatron warns at import about every optional package; the start-up block says what matters of it."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=".*[Aa]pex.*")
    warnings.filterwarnings("ignore", message=".*Transformer Engine.*")
