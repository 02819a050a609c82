"""What XMoELayer adds to Megatron's layer around its dispatcher: capacity, replayed routes, counts for the bias."""

from functools import partial

import harness
import pytest
import torch
from tolerances import assert_close, assert_same

from megatron_xmoe.dispatch.capacity import expert_capacity

HIDDEN, TOKENS = 8, 10


@pytest.fixture(scope="module", autouse=True)
def groups():
    with harness.single_process(), harness.model_parallel():
        yield


def layer(kind, **options):
    """A layer in fp64; the same seed gives the same weights."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(3)
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=4, moe_router_topk=2,
        moe_ffn_hidden_size=6, ffn_hidden_size=6, add_bias_linear=False, gradient_accumulation_fusion=False,
        bias_activation_fusion=False, moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall",
        params_dtype=torch.float64, use_cpu_initialization=True, **options,
    )  # fmt: skip
    built = kind(config, submodules=get_moe_module_spec(use_te=False, num_experts=4).keywords["submodules"])
    built.set_layer_number(1)
    return built


def classes():
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_xmoe.config import XMoEConfig
    from megatron_xmoe.layer import XMoELayer

    return MoELayer, partial(XMoELayer, xmoe=XMoEConfig(moe_backend="xmoe", xmoe_min_capacity=0))


def tokens(seed=0):
    return torch.randn(TOKENS, 1, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.25, 3.0])
@pytest.mark.parametrize("tokens, topk, experts", [(1, 1, 8), (7, 3, 8), (32, 2, 6), (0, 2, 4)])
def test_capacity_is_megatrons(tokens, topk, experts, factor):
    from megatron.core.transformer.moe.moe_utils import get_capacity

    expected = get_capacity(tokens * topk, experts, factor)
    assert expert_capacity(tokens, topk, experts, factor) == expected
    assert expert_capacity(tokens, topk, experts, factor, minimum=4) == max(expected, 4)
    assert expert_capacity(tokens, topk, experts, None, minimum=4) is None


@pytest.mark.parametrize("factor", [0.25, 0.6, 1.0])
def test_bias_counts_what_is_kept(factor):
    """Megatron's router counts its routes after dropping; the count decides how the expert bias moves."""
    options = {"moe_expert_capacity_factor": factor, "moe_router_score_function": "sigmoid",
               "moe_router_enable_expert_bias": True}  # fmt: skip
    counts, outputs = [], []
    for kind in classes():
        built = layer(kind, **options)
        outputs.append(built(tokens())[0])
        counts.append(built.router.local_tokens_per_expert.clone())
        with torch.no_grad():  # the first pass of recomputation, or evaluation
            built(tokens(1))
        assert_same(built.router.local_tokens_per_expert, counts[-1])
    assert_same(counts[1], counts[0])
    assert counts[0].sum() < 2 * TOKENS
    assert_close(outputs[1], outputs[0])


def test_padding_is_not_counted_wrongly():
    """With padding the expert bias follows valid tokens, which the correction for dropped routes does not know."""
    built = layer(classes()[1], moe_expert_capacity_factor=1.0, moe_router_score_function="sigmoid",
                  moe_router_enable_expert_bias=True)  # fmt: skip
    with pytest.raises(ValueError, match="a padding mask with --moe-router-enable-expert-bias, and dropping"):
        built(tokens(), padding_mask=torch.zeros(1, TOKENS, dtype=torch.bool))


def test_only_the_routers_own_dropping_is_off():
    """The configuration that the rest of the layer shares keeps the factor."""
    built = layer(classes()[1], moe_expert_capacity_factor=0.5)
    assert built.config.moe_expert_capacity_factor == built.token_dispatcher.config.moe_expert_capacity_factor == 0.5
    assert built.router.config.moe_expert_capacity_factor is None
    _, routing_map = built.route(tokens())
    assert (routing_map.sum(dim=1) == 2).all()


def test_recorded_routes_are_replayed():
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    built = layer(classes()[1], moe_enable_routing_replay=True)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    _, recorded = built.route(tokens())
    _, other = built.route(tokens(1))
    assert not torch.equal(recorded, other)
    built.route(tokens())
    RouterReplay.set_replay_data(RouterReplay.get_recorded_data())
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    _, replayed = built.route(tokens(1))
    assert_same(replayed, recorded)
    RouterReplay.clear_global_router_replay_instances()


def test_layers_of_further_tokens_are_counted_after_the_others(monkeypatch):
    counted = []
    monkeypatch.setattr("megatron_xmoe.layer.count_routes", lambda number, routing_map: counted.append(number))
    for is_mtp_layer in (False, True):
        built = layer(partial(classes()[1], is_mtp_layer=is_mtp_layer), moe_expert_capacity_factor=1.0)
        built.route(tokens())
    assert counted == [1, 2]  # of a model with one layer


@pytest.mark.parametrize("gate", [False, True])
def test_shared_experts_during_the_exchanges(gate):
    """Overlapped or not, the output and its gradients are the same."""
    results = []
    for overlap in (False, True):
        built = layer(classes()[1], moe_shared_expert_intermediate_size=6, moe_shared_expert_gate=gate,
                      moe_shared_expert_overlap=overlap)  # fmt: skip
        x = tokens().requires_grad_()
        output, _ = built(x)
        output.square().sum().backward()
        results.append([output.detach(), x.grad, *(p.grad for p in built.parameters())])
        assert (built.token_dispatcher.shared_experts is not None) == overlap
    for plain, overlapped in zip(*results, strict=True):
        assert_close(overlapped, plain)
