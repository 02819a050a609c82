"""A program for tests: the logits and the loss of a converted checkpoint in the layout that the arguments say.

Arguments: a file of tokens, the checkpoint, a file for the results, and further arguments of Megatron.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from megatron_xmoe.checkpoint.convert import checkpoint_arguments
from megatron_xmoe.training.logits import logits_of, with_model


def main(tokens_file: str, checkpoint: str, out: str, *arguments: str) -> None:
    """Compute and save, on rank 0."""
    tokens = torch.load(tokens_file, weights_only=True)
    words, vocabulary = checkpoint_arguments(Path(checkpoint))
    words += ["--seq-length", str(tokens.shape[1] - 1), *arguments]

    def measure(model) -> dict[str, Tensor]:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1]).unsqueeze(0)
        losses = model(inputs[:1], positions, None, labels=labels[:1])
        return {"logits": logits_of(model, inputs)[..., :vocabulary].contiguous(), "loss": losses.mean()}

    result = with_model(words, Path(checkpoint), vocabulary, measure, int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        torch.save(result, out)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
