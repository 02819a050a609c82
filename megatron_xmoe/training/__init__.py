"""Everything around Megatron's training loop: arguments, checks, batches, loss. The only user of megatron.training."""
