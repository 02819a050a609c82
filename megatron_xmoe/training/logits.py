"""Logits of a checkpoint's model, built and loaded exactly as a training run would."""

import sys
from collections.abc import Callable
from pathlib import Path

from megatron_xmoe.platform import cpu, wheel
from megatron_xmoe.training.errors import UsageError

# a run that trains nothing: no data, no optimizer
NO_TRAINING = """
    --skip-train --mock-data --micro-batch-size 1 --global-batch-size {world} --eval-iters 0 --lr 0
    --tokenizer-type NullTokenizer --exit-on-missing-checkpoint --ckpt-format torch_dist --no-load-optim --no-load-rng
"""


def with_model(arguments: list[str], checkpoint: Path, vocabulary: int, use: Callable, world_size: int = 1) -> object:
    """Build a model from Megatron's arguments, load a checkpoint into it, and hand it to `use`.

    Args:
        arguments: words of a command line.
        checkpoint: for --load.
        vocabulary: number of tokens, for the tokenizer that only counts.
        use: function of the model, in evaluation mode and with gradients off; what it returns is returned.
        world_size: processes of the data-parallel group, at most.

    Raises:
        UsageError: something that cannot work; Megatron's own errors come as they are.
    """
    on_cpu = cpu.needed()
    stand_ins = cpu.install() if on_cpu else []
    repairs = wheel.install()
    from megatron_xmoe.training.main import alone_without_launcher, prepare

    alone_without_launcher()
    fixed = NO_TRAINING.format(world=world_size).split()
    words = [*arguments, *fixed, "--vocab-size", str(vocabulary), "--load", str(checkpoint)]
    before, sys.argv = sys.argv, ["pretrain_xmoe.py", *words]  # Megatron's parser reads it, in several places
    try:
        return prepare(on_cpu, len(stand_ins), len(repairs), run=lambda container, _: _use(container, use))(0.0)
    finally:
        sys.argv = before


def _use(container, use: Callable) -> object:
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training.training import initialize_megatron, setup_model_and_optimizer

    initialize_megatron()
    models, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=container,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    if len(models) > 1:
        raise UsageError("logits are computed without virtual pipeline stages. Fix: leave them out")
    model = unwrap_model(models[0]).eval()
    with torch.no_grad():
        return use(model)


def logits_of(model, tokens):
    """Logits of a model of one pipeline stage.

    Args: tokens [B, S] int64. Returns [B, S, V] float32 on the CPU, V padded as the model's vocabulary is.
    """
    import torch
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    rows = []
    for row in tokens.split(1):  # a sequence at a time: the logits are large
        row = row.to(next(model.parameters()).device)
        positions = torch.arange(row.shape[1], device=row.device).unsqueeze(0)
        rows.append(gather_from_tensor_model_parallel_region(model(row, positions, None)).float().cpu())
    return torch.cat(rows)
