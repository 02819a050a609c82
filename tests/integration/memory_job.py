"""Counts the bytes that a forward pass of a model keeps for its backward pass, and prints them with the estimate."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


def measure(container, _) -> None:
    """Build the model, run a micro-batch forward, print bytes kept, estimated, and of what is computed again."""
    import torch
    from dry_run import rank_of
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args
    from megatron.training.training import initialize_megatron, setup_model_and_optimizer
    from memory_estimate import activation_bytes

    args = get_args()
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder, checkpointing_context={}, cfg_container=container, pg_collection=groups
    )
    model = unwrap_model(models[0])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return tensor

    tokens = torch.randint(0, args.padded_vocab_size, (args.micro_batch_size, args.seq_length))
    positions = torch.arange(args.seq_length).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, positions, None, labels=tokens)
    print(json.dumps([sum(map(len, kept.values())), *activation_bytes(args, rank_of(args, [model]))]))


if __name__ == "__main__":
    from megatron_xmoe.training.main import prepare

    prepare(on_cpu=True, stand_ins=0, repairs=0, run=measure)(0.0)
