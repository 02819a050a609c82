"""Grouped experts in a whole layer on two processes: what is kept for backward, and gradients in Megatron's buffers."""

from functools import cache

import harness
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close, assert_same

WORLD, EXPERTS, TOPK, HIDDEN, FFN, TOKENS, MICRO_BATCHES = 2, 4, 3, 32, 20, 24, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(ep: int, dtype: torch.dtype, biases: bool = False, **options):
    """A layer with grouped experts, the same on both ranks; `options` are X-MoE's."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xmoe.config import XMoEConfig
    from megatron_xmoe.specs import substitute, substitutions

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, num_moe_experts=EXPERTS, moe_router_topk=TOPK,
        moe_ffn_hidden_size=FFN, ffn_hidden_size=FFN, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=biases, bias_activation_fusion=False, gradient_accumulation_fusion=False,
        moe_router_load_balancing_type="none", params_dtype=dtype, moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True, expert_model_parallel_size=ep, expert_tensor_parallel_size=1,
        bf16=dtype == torch.bfloat16,
    )  # fmt: skip
    table = substitutions(config, XMoEConfig("xmoe", **options))
    submodules = substitute(get_moe_module_spec(use_te=False, num_experts=EXPERTS).keywords["submodules"], table)
    assert table[MoELayer] and table[SequentialMLP]
    layer = table[MoELayer](config, submodules=submodules)
    layer.set_layer_number(1)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(layer.named_parameters()):
            generator = torch.Generator().manual_seed(i)
            whole = parameter.shape if not name.startswith("experts") else (EXPERTS, *parameter.shape[1:])
            drawn = torch.randn(whole, generator=generator) * 0.3
            mine = slice(layer.local_expert_indices[0], layer.local_expert_indices[-1] + 1)
            parameter.copy_(drawn[mine] if name.startswith("experts") else drawn)
    return layer


def tokens(dtype: torch.dtype, micro_batch: int = 0) -> torch.Tensor:
    """A rank's input [S, B, H] of a micro-batch."""
    generator = torch.Generator().manual_seed(10 * torch.distributed.get_rank() + micro_batch)
    return torch.randn(TOKENS, 1, HIDDEN, generator=generator).to(dtype)


def kept(ep: int, dtype: torch.dtype, recompute: bool) -> dict[str, int]:
    """Bytes that the stages after the router keep for backward, each storage once, weights aside; and row counts."""
    layer = build(ep, dtype, xmoe_recompute_activation=recompute)
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    x = tokens(dtype).requires_grad_()
    probs, routing_map = layer.route(x)
    storages: dict[int, torch.Tensor] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.untyped_storage().data_ptr() not in weights:
            storages[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        rows, row_probs = layer.preprocess(x, probs, routing_map)
        received, received_probs = layer.dispatch(rows, row_probs)
        output, _ = layer.routed_experts_compute(received, received_probs)
        output = layer.postprocess(layer.combine(output), None)
    rows_kept = [s for s in storages.values() if s.is_floating_point() and s.shape[-1] in (HIDDEN, 2 * FFN)]
    others = [s for s in storages.values() if not (s.is_floating_point() and s.shape[-1] in (HIDDEN, 2 * FFN))]
    output.sum().backward()
    assert x.grad.isfinite().all()
    return {
        "rows": sum(s.untyped_storage().nbytes() for s in rows_kept),
        "metadata": sum(s.untyped_storage().nbytes() for s in others),
        "received": received_probs.shape[0],
        "routes": row_probs.shape[0],
    }


def gradients(ep: int, fusion: str, overlap: bool, distributed: bool, zero_out: bool, dtype: torch.dtype) -> dict:
    """What is in Megatron's gradient buffers after some micro-batches and their reduction."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    layer = build(ep, dtype, biases=True, xmoe_gradient_accumulation_fusion=fusion)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=distributed
    )
    wrapped = DistributedDataParallel(layer.config, settings, layer)
    for parameter in layer.experts.parameters():
        parameter.zero_out_wgrad = zero_out
    for _ in range(2):  # the second time from buffers that were used
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            for micro_batch in range(MICRO_BATCHES - 1):
                wrapped(tokens(dtype, micro_batch))[0].square().sum().backward()
        wrapped(tokens(dtype, MICRO_BATCHES - 1))[0].square().sum().backward()
        wrapped.finish_grad_sync()
    added = {name: p.grad_added_to_main_grad for name, p in layer.experts.named_parameters()}
    return {"grads": {name: shard(wrapped, p) for name, p in layer.named_parameters()}, "added": added}


def shard(wrapped, parameter) -> torch.Tensor:
    """The gradient; with the distributed optimizer this rank's part of the buffer, which is all that is reduced."""
    if not wrapped.ddp_config.use_distributed_optimizer:
        return parameter.main_grad.clone()
    groups = wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups
    (group, bucket), = [(g, b) for g in groups for b in g.buckets if parameter in b.params]
    parts = bucket.grad_data.chunk(group.intra_distributed_optimizer_instance_size)
    return parts[group.intra_distributed_optimizer_instance_rank].clone()


GRADIENT_CASES = [
    (ep, fusion, overlap, distributed, zero_out, name)
    for ep in (1, 2)
    for overlap, distributed, zero_out in ((False, False, False), (True, False, False), (True, True, False),
                                           (False, False, True))
    for fusion in ("on", "off")
    for name in DTYPES
]  # fmt: skip
KEPT_CASES = [(ep, name, recompute) for ep in (1, 2) for name in DTYPES for recompute in (False, True)]


def run() -> dict:
    """Everything on this rank, by case."""
    results = {}
    for size in (1, 2):
        with harness.model_parallel(ep=size):
            for ep, name, recompute in KEPT_CASES:
                if ep == size:
                    results[ep, name, recompute] = kept(ep, DTYPES[name], recompute)
            for *case, name in GRADIENT_CASES:
                if case[0] == size:
                    results[*case, name] = gradients(*case, DTYPES[name])
    return results


@cache
def results() -> list[dict]:
    """What each rank found."""
    return harness.run_distributed(run, WORLD)


@pytest.mark.parametrize("ep, name, recompute", KEPT_CASES)
def test_bytes_kept_for_backward(ep, name, recompute):
    """2d + 4Kn a token in 16 bits, twice that in 32; the received rows are the input where experts are elsewhere."""
    for rank in results():
        found, size = rank[ep, name, recompute], DTYPES[name].itemsize
        assert found["routes"] == TOKENS * TOPK
        rows = TOKENS if ep == 1 else found["received"]
        formula = size * (rows * HIDDEN + (0 if recompute else found["received"] * 2 * FFN))
        assert found["rows"] == pytest.approx(formula, rel=0.01)
        if ep == 1 and not recompute:
            assert formula / TOKENS == size * (HIDDEN + 2 * TOPK * FFN)
        # maps, indices and weights of routes: some tens of bytes a route, whatever the sizes of rows
        assert found["metadata"] <= 48 * (found["routes"] + found["received"]) + 64 * TOKENS


@pytest.mark.parametrize("case", [case for case in GRADIENT_CASES if case[1] == "on"], ids=str)
def test_gradients_in_megatrons_buffers(case):
    """Added by the products, they are what Megatron's hooks add: to fp32's last bits, or to what bf16 rounds away."""
    for rank in results():
        fused, plain = rank[case], rank[(case[0], "off", *case[2:])]
        assert fused["added"] == {name: name.endswith("weight") for name in fused["added"]}
        assert not any(plain["added"].values())
        for name, grad in fused["grads"].items():
            assert grad.dtype == torch.float32 and grad.any()
            assert_close(grad, plain["grads"][name], DTYPES[case[-1]])
    if not case[3]:  # reduced over the ranks that share a parameter
        first, second = (rank[case]["grads"] for rank in results())
        assert_same(first["router.weight"], second["router.weight"])


def test_fused_gradients_are_not_rounded():
    """In bf16 the two ways differ in every weight, or the products have not added in fp32."""
    for ep in (1, 2):
        fused, plain = (results()[0][ep, fusion, False, False, False, "bf16"]["grads"] for fusion in ("on", "off"))
        assert not torch.equal(fused["experts.linear_fc1.weight"], plain["experts.linear_fc1.weight"])
