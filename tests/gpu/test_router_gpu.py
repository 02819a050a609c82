"""Fused routing on a GPU against Megatron's own functions and router, and the number of its launches."""

import os
from functools import partial

import pytest
import router_cases as cases
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def groups():
    """Megatron's process groups for one GPU, and products of fp32 without TF32."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", [*cases.CASES, cases.LONG], ids=str)
def test_choice_weights_losses_and_gradient(case):
    cases.compare(case, "cuda")


def test_in_parts():
    cases.compare_in_parts("cuda")


def test_ties_and_nothing():
    cases.check_ties("cuda")
    cases.check_fine_differences("cuda")
    cases.check_nothing("cuda")


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", cases.ROUTERS)
def test_router(name, padded):
    if padded and name == "expert bias in groups":
        pytest.skip("Megatron fails to count for the bias where there is padding")
    cases.compare_routers(name, "cuda", padded)


def test_router_in_bf16():
    cases.compare_bf16_routers("cuda")


def test_layer():
    cases.compare_layers("cuda")
    cases.check_refusals()


def test_repeats_bit_for_bit():
    """Sums run in a fixed order, and counts are whole numbers."""
    from megatron_xmoe.ops.router import Balance, RoutingRule, route

    logits = torch.randn(9000, 128, device="cuda")
    results = []
    for _ in range(3):
        x = logits.clone().requires_grad_()
        added = torch.zeros(128, dtype=torch.int32, device="cuda")
        probs, routing_map, loss = route(x, RoutingRule(8, 128, "sigmoid"), added=added, balances=[Balance(1.0, 9000)])
        (probs.square().sum() + loss).backward()
        results.append((probs.detach(), routing_map, loss.detach(), added, x.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def launched(function) -> list[str]:
    """Names of what a call runs on the GPU."""
    function()  # compiles
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_launches():
    """The product, two kernels, and what Megatron logs; backward one kernel besides the products."""
    config = partial(cases.config_of, **cases.ROUTERS["aux_loss"] | {"num_moe_experts": 128, "moe_router_topk": 8})
    numbers = {}
    for fuses in (False, True):
        router = cases.router_of(config(params_dtype=torch.bfloat16), fuses, "cuda").train()
        hidden = torch.randn(4096, 1, cases.HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        forward = launched(lambda: router(hidden))  # noqa: B023
        probs, _ = router(hidden)
        grad = torch.ones_like(probs)
        backward = launched(lambda: probs.backward(grad, retain_graph=True))  # noqa: B023
        numbers[fuses] = len(forward), len(backward)
        print(f"fusion {fuses}: {numbers[fuses][0]} launches forward, {numbers[fuses][1]} backward")
        if fuses:
            assert sum("route_kernel" in name for name in forward) == 1, forward
            assert sum("balance_kernel" in name for name in forward) == 1, forward
            assert sum("route_backward_kernel" in name for name in backward) == 1, backward
    assert numbers[True][0] <= 8 and numbers[True][0] < numbers[False][0] / 3
    assert numbers[True][1] < numbers[False][1]
