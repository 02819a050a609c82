"""What the entry script computes for some families only: gradients too, over tensor-parallel ranks."""

from types import SimpleNamespace

import harness
import pytest
import torch
from jobs import TOY, run_job

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def tensors(keys: bool) -> dict[str, torch.Tensor]:
    """Input [S, B, heads, D], weight [heads * D] and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    heads = KEY_HEADS if keys else HEADS
    shape = (3, 2, heads, SIZE)
    return {
        "hidden": torch.randn(shape, generator=generator),
        "weight": torch.randn(heads * SIZE, generator=generator),
        "grad": torch.randn(shape, generator=generator),
    }


def normalise_in_parallel() -> list[tuple[torch.Tensor, ...]]:
    """On a rank: output, gradient of its heads and of its weight, for queries and keys."""
    from megatron.core import parallel_state

    from megatron_xmoe.qk_norm import AllHeadsNorm

    results = []
    with harness.model_parallel(tp=2):
        rank = parallel_state.get_tensor_model_parallel_rank()
        config = SimpleNamespace(num_attention_heads=HEADS, num_query_groups=KEY_HEADS, normalization="RMSNorm")
        for keys in (False, True):
            given = tensors(keys)
            norm = AllHeadsNorm(config, SIZE, eps=1e-3, keys=keys)
            norm.weight.data.copy_(given["weight"].chunk(2)[rank])
            hidden = given["hidden"].chunk(2, dim=2)[rank].clone().requires_grad_()
            output = norm(hidden)
            output.backward(given["grad"].chunk(2, dim=2)[rank])
            results.append((output.detach(), hidden.grad, norm.weight.grad))
    return results


def test_a_norm_over_all_heads_is_one_norm_on_two_ranks():
    ranks = harness.run_distributed(normalise_in_parallel, 2)
    for i, keys in enumerate((False, True)):
        given = tensors(keys)
        hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
        output = torch.nn.functional.rms_norm(hidden.flatten(2), weight.shape, weight, eps=1e-3).view_as(hidden)
        output.backward(given["grad"])
        for part, whole, dim in ((0, output, 2), (1, hidden.grad, 2), (2, weight.grad, 0)):
            torch.testing.assert_close(torch.cat([rank[i][part] for rank in ranks], dim=dim), whole)


def test_raw_logits_leave_the_losses_on_the_probabilities_alone():
    from megatron_xmoe.routing import raw_logits

    weight, hidden = torch.randn(4, 8), torch.randn(3, 2, 8)
    router = SimpleNamespace(gating=lambda rows: rows @ weight.T)
    logits = hidden.view(6, 8) @ weight.T
    chosen = torch.zeros(6, 4, dtype=torch.bool).scatter_(1, logits.topk(2).indices, True)
    probs = logits.softmax(-1).requires_grad_()
    called = []
    probs.register_hook(called.append)
    result = raw_logits(router, hidden, probs, chosen)
    assert torch.equal(result, torch.where(chosen, logits, 0))
    result.sum().backward()
    assert len(called) == 1 and not called[0].any()


@pytest.mark.parametrize("topk", [2, 4])
def test_groups_are_ranked_by_their_best_expert(topk):
    from megatron_xmoe.routing import BestOfGroup

    scores = torch.rand(50, 12)
    values, experts = BestOfGroup().get_replay_topk(scores, topk, 4, 2, None)
    for row, chosen, value in zip(scores, experts, values, strict=True):
        groups = sorted(range(4), key=lambda group: -row[3 * group : 3 * group + 3].max())[:2]
        allowed = [expert for group in groups for expert in range(3 * group, 3 * group + 3)]
        expected = sorted(allowed, key=lambda expert: -row[expert])[:topk]
        assert chosen.tolist() == expected and torch.equal(value, row[chosen])


def test_the_spec_by_name_has_the_norms_too(monkeypatch):
    """A low-rank-free query is not normalised in the spec for --spec, either."""
    from megatron_xmoe import specs

    calls = []

    def noted(spec, config, all_heads):
        calls.append(config)
        return spec, all_heads

    monkeypatch.setattr(specs, "get_gpt_decoder_block_spec", lambda *args, **kwargs: "stock")
    monkeypatch.setattr(specs, "substitutions", lambda *args: {})
    monkeypatch.setattr(specs, "with_query_key_norms", noted)
    config = SimpleNamespace(transformer_impl="local", normalization="RMSNorm", qk_l2_norm=False)
    assert specs.xmoe_decoder_block_spec(config) == ("stock", False) and calls == [config]


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("--xmoe-group-score max", "there are none"),
        ("--xmoe-qk-norm all-heads", "--qk-layernorm"),
        ("--moe-router-num-groups 4 --moe-router-group-topk 2 --xmoe-group-score max --moe-backend megatron", "xmoe"),
        ("--xmoe-combine-weights logits --moe-backend megatron", "xmoe"),
        ("--xmoe-combine-weights logits --moe-input-jitter-eps 0.1", "jitter"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(option, rule):
    job = run_job(TOY, "--moe-backend xmoe --train-iters 1".split(), option.split(), fails=True)
    told = job.told()
    assert job.returncode == 2 and len(told) == 1 and rule in told[0] and "--xmoe-" in told[0]
