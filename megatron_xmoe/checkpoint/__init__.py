"""Conversion of checkpoints between HuggingFace, Megatron's torch_dist format and the original X-MoE."""
