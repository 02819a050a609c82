"""A program for tests: what the multi-token-prediction layer of a converted checkpoint predicts.

Arguments: a file of tokens, the checkpoint, a file for the logits [1, S, V] of the first row.
"""

import sys
from pathlib import Path

import torch

from megatron_xmoe.checkpoint.convert import checkpoint_arguments
from megatron_xmoe.training.logits import with_model


def main(tokens_file: str, checkpoint: str, out: str) -> None:
    """Compute and save."""
    tokens = torch.load(tokens_file, weights_only=True)
    words, vocabulary = checkpoint_arguments(Path(checkpoint))

    def predict(model):
        caught = []
        model.mtp.layers[0].register_forward_hook(lambda module, inputs, output: caught.append(output))
        inputs, labels = tokens[:1, :-1], tokens[:1, 1:]
        model(inputs, torch.arange(inputs.shape[1]).unsqueeze(0), None, labels=labels)
        hidden = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
        logits, _ = model.output_layer(hidden)
        return logits.transpose(0, 1)

    words += ["--seq-length", str(tokens.shape[1] - 1)]
    torch.save(with_model(words, Path(checkpoint), vocabulary, predict), out)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
