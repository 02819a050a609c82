"""The reference operations, the attention and the layer on a GPU. Not run by CI, which has none."""

import os
import warnings
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
TOOLS = Path(__file__).resolve().parents[2] / "tools"
T, K, E, H = 512, 6, 64, 256


@pytest.fixture(scope="module")
def groups():
    """Megatron's process groups for one GPU."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def routed(device, dtype):
    from megatron_xmoe.ops import build_routes

    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(T, E, generator=generator)
    weights, ids = scores.topk(K, dim=1)
    x = torch.randn(T, H, generator=generator).to(device, dtype)
    return x, build_routes(ids.to(device), weights.to(device, dtype), E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_movement_equals_the_cpu_and_repeats_bit_for_bit(dtype):
    from megatron_xmoe.ops import gather_rows, gather_sum

    results = []
    for device in ("cpu", "cuda", "cuda"):
        x, routes = routed(device, dtype)
        x.requires_grad_()
        rows = gather_rows(x, routes.token_ids, routes.inverse)
        total = gather_sum(rows * 0.5, routes.inverse, token_ids=routes.token_ids)
        (total * torch.arange(H, device=device)).sum().backward()
        results.append([t.detach().cpu() for t in (routes.token_ids, routes.expert_ids, rows, total, x.grad)])
    cpu, first, second = results
    assert all(torch.equal(a, b) for a, b in zip(cpu[:4], first[:4], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (cpu[4].double() - first[4].double()).norm() <= 1e-5 * cpu[4].double().norm()


def moe_layers(dtype):
    from functools import partial

    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xmoe.layer import XMoELayer

    config = TransformerConfig(
        num_layers=1, hidden_size=H, num_attention_heads=4, num_moe_experts=E, moe_router_topk=K, ffn_hidden_size=128,
        moe_ffn_hidden_size=128, add_bias_linear=False, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, moe_token_dispatcher_type="alltoall", moe_aux_loss_coeff=1e-2,
        params_dtype=dtype, bf16=dtype == torch.bfloat16, gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=E)
    stock = spec(config=config, layer_number=1).cuda()
    xmoe = partial(XMoELayer, **spec.keywords)(config=config, layer_number=1).cuda()
    assert type(stock) is MoELayer
    xmoe.load_state_dict(stock.state_dict())
    return stock, xmoe


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_layer_equals_stock_megatron(groups, dtype, tolerance):
    stock, xmoe = moe_layers(dtype)
    x = torch.randn(T, 2, H, device="cuda", dtype=dtype)
    grad = torch.randn_like(x)
    outputs = []
    for layer in (stock, xmoe):
        inputs = x.clone().requires_grad_()
        output, _ = layer(inputs)
        output.backward(grad)
        outputs.append([output, inputs.grad, *(p.grad for p in layer.parameters())])
    for expected, actual in zip(*outputs, strict=True):
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < tolerance


def test_one_host_synchronisation_forward_none_backward(groups):
    _, layer = moe_layers(torch.bfloat16)
    dispatcher = layer.token_dispatcher
    x = torch.randn(T, 2, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probs, routing_map = layer.route(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows, weights = dispatcher.dispatch_preprocess(x, routing_map, probs)
            rows, weights = dispatcher.token_dispatch(rows, weights)
            rows, _, weights = dispatcher.dispatch_postprocess(rows, weights)
            rows = dispatcher.token_combine(dispatcher.combine_preprocess(rows * weights.unsqueeze(1)))
            output = dispatcher.combine_postprocess(rows)
            forward = len(caught)
            output.backward(torch.ones_like(output))
            backward = len(caught) - forward
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (forward, backward) == (1, 0), [str(w.message) for w in caught]


def test_recording_waits_for_nothing(groups, monkeypatch):
    """With every figure, and every stage timed, a layer that has all experts does not wait for the device."""
    monkeypatch.syspath_prepend(TOOLS)
    from dispatch_cases import Setting, build_layer, count_syncs
    from megatron.core.transformer.moe import moe_logging

    from megatron_xmoe.metrics import XMoETracker

    setting = Setting(T, K, E, H, torch.bfloat16, torch.device("cuda"), ep_size=1, ranks_per_node=None)
    layer, tracker = build_layer(setting, "alltoall", 128), XMoETracker(1, E, 1, "layers", breakdown=True)
    before = moe_logging.get_moe_metrics_tracker()
    moe_logging.set_moe_metrics_tracker(tracker)
    try:
        assert count_syncs(setting, layer) == (0, 0)
        tracker._late.read()
    finally:
        moe_logging.set_moe_metrics_tracker(before)
    assert tracker._sent.sum() == 2 * T * K  # both passes were recorded
    spent = tracker._clock.read()
    assert {stage for _, stage in spent} == {"gate", "permute", "experts", "unpermute", "dispatch", "combine"}
    assert all(milliseconds >= 0 for milliseconds in spent.values())


def test_dispatch_and_combine_run_our_kernels_only(groups):
    """What moves rows is ours; of torch's there is a running sum over the experts' counts."""
    from torch.profiler import ProfilerActivity, profile

    from megatron_xmoe.kernels.registry import kernels_in_use

    assert kernels_in_use().name == "cpp", "built for this machine: see python -m megatron_xmoe.info"
    _, layer = moe_layers(torch.bfloat16)
    dispatcher = layer.token_dispatcher
    x = torch.randn(T, 2, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probs, routing_map = (t.detach() for t in layer.route(x))
    probs.requires_grad_()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        rows, weights = dispatcher.dispatch_preprocess(x, routing_map, probs)
        rows, weights = dispatcher.token_dispatch(rows, weights)
        rows, _, weights = dispatcher.dispatch_postprocess(rows, weights)
        rows = dispatcher.token_combine(dispatcher.combine_preprocess(rows))
        output = dispatcher.combine_postprocess(rows)
        torch.autograd.backward([output, weights], [torch.ones_like(output), torch.ones_like(weights)])
        torch.cuda.synchronize()
    names = [event.key for event in profiled.key_averages() if "Memcpy" not in event.key and "Memset" not in event.key]
    print(profiled.key_averages().table(sort_by="cuda_time_total", max_name_column_width=90))
    ours = [name for name in names if "xmoe" in name or name == "sum_kernel"]  # sums are Triton's, which is faster
    for wanted in ("choices_kernel", "choices_gradient_", "count_kernel", "place_kernel", "spread_", "sum_kernel"):
        assert any(wanted in name for name in ours), f"{wanted} did not run: {ours}"
    foreign = [name for name in names if name not in ours]
    moving = ("sort", "index", "mask", "gather", "scatter")
    assert not [name for name in foreign if any(part in name for part in moving)], foreign


@pytest.mark.parametrize("queries, groups_, head, value_head", [(16, 16, 64, 64), (16, 4, 64, 64), (16, 16, 192, 128)])
def test_attention_on_the_gpu(groups, queries, groups_, head, value_head):
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xmoe.attention import SDPACoreAttention

    config = TransformerConfig(num_layers=1, hidden_size=1024, num_attention_heads=queries, num_query_groups=groups_)
    attention = SDPACoreAttention(config, 1, AttnMaskType.causal, "self", attention_dropout=0.0, k_channels=head)
    q = torch.randn(256, 2, queries, head, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(256, 2, groups_, head, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(256, 2, groups_, value_head, device="cuda", dtype=torch.bfloat16)
    output = attention(q, k, v, None)
    key, value = (t.repeat_interleave(queries // groups_, dim=2).double() for t in (k, v))
    scores = torch.einsum("sbnd,cbnd->bnsc", q.double(), key) / head**0.5
    scores = scores.masked_fill(torch.ones(256, 256, device="cuda").triu(1).bool(), float("-inf"))
    expected = torch.einsum("bnsc,cbnd->sbnd", scores.softmax(-1), value).flatten(start_dim=2)
    assert output.shape == expected.shape
    assert (output.double() - expected).norm() < 5e-3 * expected.norm()
