"""RMSNorm and LayerNorm in plain torch that also work with --sequence-parallel."""

import torch
from megatron.core.transformer import TransformerConfig


class TorchNorm:
    """Builds torch's RMSNorm or LayerNorm, as Megatron's WrappedTorchNorm does, with the sequence-parallel mark.

    With sequence parallelism each tensor-parallel rank normalises its own tokens, so a weight's gradient is partial
    on every rank. Megatron sums such gradients for parameters that carry `sequence_parallel` (finalize_model_grads);
    its own torch norm lacks the mark and refuses the option. Parameter names and shapes are those of the stock norm.
    """

    def __new__(
        cls,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
    ) -> torch.nn.Module:
        """Args are those of Megatron's LayerNormBuilder: `hidden_size` is the normalised width.

        Raises:
            ValueError: a normalisation or an option that torch's norms do not have.
        """
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "--apply-layernorm-1p needs a norm of Transformer Engine or Apex, and neither is installed: "
                "install one or leave the option out"
            )
        norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in norms:
            raise ValueError(
                f"--normalization {config.normalization} is not available without Transformer Engine; "
                f"use one of {', '.join(norms)}"
            )
        norm = norms[config.normalization](normalized_shape=hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
