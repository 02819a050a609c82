"""Clipping in the distributed optimizer on two processes: the same steps as with Megatron's own functions."""

from unittest import mock

import harness
import pytest
import torch

STEPS, SIZES = 3, (16, 24, 5)


def steps(stock: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Norms of a few steps, the clipped gradients of the last one's shards, and the parameters after it.

    Every rank has other gradients.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    names = ("l2_norm_impl", "multi_tensor_scale_impl")
    chosen = {name: getattr(clip_grads, name) for name in names}
    if stock:
        chosen = {name: function._megatron_xmoe_original for name, function in chosen.items()}
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    module = MegatronModule(config)
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate(SIZES):
        parameter = torch.nn.Parameter(torch.randn(size, 8, generator=generator))
        module.register_parameter(f"weight{number}", parameter)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), module)
    wanted = OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.1, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(wanted, [model])
    generator.manual_seed(1 + torch.distributed.get_rank())
    norms = []
    with mock.patch.multiple(clip_grads, **chosen):
        for _ in range(STEPS):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            factors = [torch.randn(parameter.shape, generator=generator) for parameter in module.parameters()]
            sum((p.square() * f).sum() for p, f in zip(module.parameters(), factors, strict=True)).backward()
            model.finish_grad_sync()
            done, norm, _ = optimizer.step()
            assert done
            norms.append(float(norm))
    clipped = [parameter.grad for parameter in optimizer.get_parameters()]
    return norms, [tensor.detach().clone() for tensor in (*clipped, *module.parameters())]


def both():
    with harness.model_parallel():
        return steps(stock=True), steps(stock=False)


def test_steps_of_the_distributed_optimizer():
    ranks = harness.run_distributed(both, 2, timeout=240)
    for (expected_norms, expected), (norms, tensors) in ranks:
        assert min(norms) > 1  # so clipping does something
        assert norms == pytest.approx(expected_norms, rel=1e-6)
        assert len(tensors) > len(SIZES)
        for found, other in zip(tensors, expected, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-7)
