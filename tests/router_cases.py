"""Fused routing against Megatron's own functions and router, on a GPU or in Triton's interpreter.

Everything here runs in a process in which Megatron is imported already and Triton can run.
"""

import copy
import traceback
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from tolerances import relative_rms_error
from torch import Tensor

HIDDEN = 16
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative RMS errors; in fp64 Megatron computes in fp32, too. The interpreter rounds to 16 bits by cutting off, and
Megatron rounds each part of a gradient to 16 bits before it adds them up.
"""


@dataclass(frozen=True)
class Case:
    """One way to route; names as in ops.router.RoutingRule."""

    name: str
    topk: int
    experts: int
    score_function: str = "softmax"
    pre_softmax: bool = False
    scaling: float = 1.0
    groups: int = 1
    group_topk: int = 1
    length: int = 37
    sequences: int = 1
    dtype: torch.dtype = torch.float32
    biased: bool = False
    padded: bool = False
    shift: float = 0
    """Added to the logits: exp(100) is more than fp32 holds."""

    def __str__(self) -> str:
        return self.name


BASE = Case("softmax", 3, 8)
CASES = [
    BASE,
    Case("bf16", 8, 128, dtype=torch.bfloat16),
    Case("fp16", 2, 16, dtype=torch.float16),
    Case("fp64", 6, 60, dtype=torch.float64),
    Case("K = E", 5, 5, scaling=0.5),
    Case("one expert", 1, 1, "sigmoid"),
    Case("top-1 before the choice", 1, 12, pre_softmax=True),
    Case("before the choice", 6, 60, pre_softmax=True, scaling=2.5, sequences=3),
    Case("before the choice, fp64, padded", 4, 9, pre_softmax=True, dtype=torch.float64, padded=True),
    Case("sigmoid", 6, 60, "sigmoid", scaling=2.5),
    Case("sigmoid top-1", 1, 12, "sigmoid", biased=True, padded=True),
    Case("sigmoid, 32 of 256, bias", 32, 256, "sigmoid", biased=True),
    Case("sigmoid, groups, bias", 8, 64, "sigmoid", scaling=2.5, groups=8, group_topk=4, biased=True, sequences=2),
    Case("sigmoid, groups", 4, 24, "sigmoid", groups=4, group_topk=2, dtype=torch.float64),
    Case("sigmoid, bf16, bias", 4, 24, "sigmoid", biased=True, dtype=torch.bfloat16),
    Case("root of softplus", 6, 60, "sqrtsoftplus", biased=True, sequences=2, padded=True),
    Case("root of softplus, fp64", 3, 15, "sqrtsoftplus", groups=3, group_topk=3, dtype=torch.float64),
    Case("groups of odd size", 3, 15, groups=5, group_topk=3),
    Case("groups, fp64", 4, 15, groups=3, group_topk=2, dtype=torch.float64, sequences=2),
    Case("groups before the choice", 4, 24, pre_softmax=True, groups=6, group_topk=2),
    Case("more experts than a tile has columns", 2, 3000, length=3),
    Case("large logits", 3, 8, shift=100),
    Case("large logits before the choice", 3, 8, pre_softmax=True, shift=100, dtype=torch.float64),
    Case("three sequences", 3, 300, length=50, sequences=3, padded=True),
]
LONG = Case("many tokens", 8, 128, length=9000, sequences=3, padded=True, dtype=torch.bfloat16)
"""For a GPU, where several programs have several parts."""


def bound_of(dtype: torch.dtype, device: str) -> float:
    """The largest error; the exponential function of a GPU's kernels is off by some units in the last place."""
    return BOUNDS[dtype] * (3 if device == "cuda" else 1)


def logits_of(case: Case) -> Tensor:
    """[T, E], different in each row (bias aside), also in 16 bits."""
    torch.manual_seed(1)
    tokens = case.length * case.sequences
    order = torch.rand(tokens, case.experts).argsort(dim=1)
    steps = max(case.experts, 64)
    logits = (order - case.experts / 2) * (8 / steps if case.experts <= 128 else 16 / steps)
    if case.dtype in (torch.float32, torch.float64):
        logits = logits.to(case.dtype) + torch.rand(tokens, case.experts, dtype=case.dtype) * (2 / steps)
    logits = logits.to(case.dtype) + case.shift
    assert all(len(row.unique()) == case.experts for row in logits[:100])
    return logits


def stock(case: Case, logits: Tensor, bias: Tensor | None, padding: Tensor | None, coefficients: list[float]):
    """Megatron's functions: probs, map, and the two losses, of all tokens and of each sequence."""
    from megatron.core.transformer.moe import moe_utils

    groups = {"num_groups": case.groups, "group_topk": case.group_topk} if case.groups > 1 else {}
    probs, routing_map = moe_utils.topk_routing_with_score_function(
        logits, case.topk, use_pre_softmax=case.pre_softmax, scaling_factor=case.scaling,
        score_function=case.score_function, expert_bias=bias, **groups,
    )  # fmt: skip
    chosen, scores = moe_utils.compute_routing_scores_for_aux_loss(
        logits, case.topk, case.score_function, padding_mask=padding
    )
    tokens = len(logits) if padding is None else (~padding).sum()
    losses = []
    for coefficient, parts in zip(coefficients, (1, case.sequences), strict=True):
        of_parts = [x.reshape(len(logits) // parts, -1) for x in (scores, chosen)]
        loss = moe_utils.switch_load_balancing_loss_func(
            of_parts[0], of_parts[1].sum(dim=0), tokens / parts, case.topk, case.experts, coefficient
        )
        losses.append(loss / parts)
    return probs, routing_map, *losses


def fused(case: Case, logits: Tensor, bias, padding, coefficients: list[float], added: Tensor):
    """The same by this project's kernels; the first loss as where nothing has to be exchanged, if it can be."""
    from megatron_xmoe.ops.router import Balance, RoutingRule, route

    names = ("topk", "experts", "score_function", "pre_softmax", "scaling", "groups", "group_topk")
    rule = RoutingRule(**{name: getattr(case, name) for name in names})
    assert not rule.obstacle(logits.device.type)
    tokens = len(logits) if padding is None else (~padding).sum()
    balances = []
    for coefficient, parts in zip(coefficients, (1, case.sequences), strict=True):
        elsewhere = None if padding is None else lambda routes, total=tokens / parts: (routes, total)
        weight = coefficient * case.experts / (case.topk * parts)
        balances.append(Balance(weight, len(logits) // parts, per_sequence=parts > 1, elsewhere=elsewhere))
    return route(logits, rule, bias, padding, added, case.sequences, balances)


def compare(case: Case, device: str) -> None:
    """Experts, weights, losses, counts and the gradient."""
    logits, coefficients = logits_of(case), [0.1, 0.3]
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(case.experts, generator=generator).to(device) if case.biased else None
    padding = (torch.rand(len(logits), generator=generator) < 0.3).to(device) if case.padded else None
    grad = torch.randn(logits.shape, generator=generator).to(device, case.dtype)
    added = torch.full((case.experts,), 7, dtype=torch.int32, device=device)
    results = []
    for function in (stock, partial(fused, added=added)):
        x = logits.to(device, copy=True).requires_grad_()
        probs, routing_map, *losses = function(case, x, bias, padding, coefficients)
        scales = (2.0 * len(logits), 3.0 * len(logits))
        weighted = sum(scale * loss for scale, loss in zip(scales, losses, strict=True))
        torch.autograd.backward([probs, weighted], [grad, torch.ones_like(weighted)])
        results.append((probs.detach(), routing_map, *(loss.detach() for loss in losses), x.grad))
    (expected, expected_map, *expected_rest), (probs, routing_map, *rest) = results
    assert torch.equal(routing_map, expected_map), f"{(routing_map != expected_map).any(dim=1).sum()} tokens differ"
    assert (probs.dtype, rest[-1].dtype) == (case.dtype, case.dtype)
    errors = [relative_rms_error(probs, expected)]
    errors += [relative_rms_error(a, b) for a, b in zip(rest, expected_rest, strict=True)]
    assert max(errors) <= bound_of(case.dtype, device), f"probs, losses, gradient: {errors}"
    counted = routing_map if padding is None else routing_map & ~padding.unsqueeze(1)
    assert torch.equal(added, 7 + counted.sum(dim=0))


def compare_in_parts(device: str) -> None:
    """Programs that take several parts, and more sequences than programs."""
    from megatron_xmoe.kernels import triton_router

    for programs in (8, 2):
        triton_router.route_tile.cache_clear()
        with mock.patch.object(triton_router, "MAX_PROGRAMS", programs):
            case = next(case for case in CASES if case.name == "three sequences")
            assert triton_router.route_tile(case.length, case.sequences, case.experts, 1)[1]["PARTS"] > 2
            compare(case, device)
    triton_router.route_tile.cache_clear()


def check_ties(device: str) -> None:
    """Of equal experts the lowest are chosen, zeros of both signs are equal, and NaN and infinity do no harm."""
    from megatron_xmoe.ops.router import RoutingRule, route

    rows = torch.tensor([[0.0] * 6, [-1, 2, 2, 2, -1, 2], [-0.0, 0.0, -0.0, -1, 0.0, -1]])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = rows.to(device, dtype)
        for rule in (RoutingRule(2, 6, "softmax"), RoutingRule(2, 6, "sigmoid")):
            probs, routing_map = route(logits, rule)
            assert routing_map.nonzero()[:, 1].view(3, 2).tolist() == [[0, 1], [1, 2], [0, 1]]
            assert torch.equal(probs, routing_map.to(dtype) * 0.5)
        odd = rows.clone()
        odd[0, 3], odd[1, 4], odd[2, :] = float("nan"), float("inf"), float("-inf")
        _, routing_map = route(odd.to(device, dtype), RoutingRule(2, 6, "softmax"))
        assert routing_map.nonzero()[:, 1].view(3, 2).tolist() == [[0, 3], [1, 4], [0, 1]]


def check_fine_differences(device: str) -> None:
    """Logits that differ in fp64 only: the largest are chosen where Megatron chooses by logits."""
    from megatron_xmoe.ops.router import RoutingRule, route

    logits = torch.ones(2, 6, dtype=torch.float64, device=device)
    logits[0, 4] += 1e-12
    logits[1, 0] -= 1e-12
    _, routing_map = route(logits, RoutingRule(1, 6, "softmax"))
    assert routing_map.nonzero()[:, 1].tolist() == [4, 1]


def check_nothing(device: str) -> None:
    """No tokens: nothing is chosen or counted, and the gradient is empty."""
    from megatron_xmoe.ops.router import RoutingRule, route

    logits = torch.empty(0, 6, device=device, requires_grad=True)
    added = torch.zeros(6, dtype=torch.int32, device=device)
    probs, routing_map = route(logits, RoutingRule(2, 6, "softmax"), added=added)
    probs.sum().backward()
    assert probs.shape == routing_map.shape == logits.grad.shape == (0, 6) and not added.any()


# options of Megatron's configuration on top of CONFIG
CONFIG = {"num_moe_experts": 8, "moe_router_topk": 3, "moe_aux_loss_coeff": 0.1}
ROUTERS = {
    "aux_loss": {"moe_router_load_balancing_type": "aux_loss"},
    "z-loss": {"moe_router_load_balancing_type": "aux_loss", "moe_z_loss_coeff": 0.1},
    "loss per token": {"moe_router_load_balancing_type": "aux_loss", "calculate_per_token_loss": True},
    "seq_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_router_pre_softmax": True,
                     "moe_router_topk_scaling_factor": 2.5},
    "seq_aux_loss per token": {"moe_router_load_balancing_type": "seq_aux_loss", "calculate_per_token_loss": True},
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss", "moe_router_dtype": "fp32"},
    "three losses": {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
                     "moe_aux_loss_coeff": [0.1, 0.05, 0.2], "moe_router_dtype": "fp64"},
    "aux and global": {"moe_router_load_balancing_type": ["global_aux_loss", "aux_loss"],
                       "moe_aux_loss_coeff": [0.1, 0.05]},
    "none": {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0},
    "expert bias in groups": {
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True, "moe_router_num_groups": 4, "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5, "moe_router_topk": 4, "moe_router_dtype": "fp32",
    },
}  # fmt: skip


def config_of(**options):
    """A configuration of one layer."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = options.pop("params_dtype", torch.float32)
    return TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, moe_ffn_hidden_size=12, ffn_hidden_size=12,
        add_bias_linear=False, gradient_accumulation_fusion=False, bias_activation_fusion=False,
        moe_token_dispatcher_type="alltoall", params_dtype=dtype, use_cpu_initialization=True, init_method_std=0.3,
        **CONFIG | options,
    )  # fmt: skip


def router_of(config, fuses: bool, device: str):
    """Megatron's router or the fused one, with the same weights and expert bias."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_xmoe.router import FusedRouter

    torch.manual_seed(5)
    config = copy.copy(config)
    config.moe_router_fusion = fuses
    router = (FusedRouter if fuses else TopKRouter)(config, pg_collection=get_default_pg_collection()).to(device)
    if config.params_dtype == torch.bfloat16:
        router.bfloat16()
    router.set_layer_number(1)
    if router.enable_expert_bias:
        router.expert_bias.copy_(torch.linspace(-0.3, 0.3, config.num_moe_experts))
    return router


def passes(router, device: str, padded: bool, length: int = 24, sequences: int = 3) -> dict[str, Tensor]:
    """What passes leave: results, gradients, counts, logged losses.

    Two of training, one of evaluation, and one as recomputation makes it first.
    """
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    tracker, found = MoEMetricsTracker(), {}
    set_moe_metrics_tracker(tracker)
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(3.0, device=device)
    dtype = router.weight.dtype
    for number, (trains, grads) in enumerate(((True, True), (True, True), (False, True), (True, False))):
        torch.manual_seed(number + 10 * torch.distributed.get_rank())
        hidden = torch.randn(length, sequences, HIDDEN).to(device, dtype).requires_grad_()
        padding = (torch.rand(length, sequences) < 0.3).to(device) if padded else None
        router.train(trains)
        with torch.set_grad_enabled(grads):
            probs, routing_map = router(hidden, padding)
        found |= {f"probs {number}": probs.detach(), f"map {number}": routing_map}
        if grads:
            (probs * torch.randn(probs.shape).to(device, probs.dtype)).sum().backward()
            found[f"gradient {number}"] = hidden.grad
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    found["weight's gradient"] = router.weight.grad
    found |= {name: buffer.clone() for name, buffer in router.named_buffers()}
    for name, entry in tracker._metrics.items():
        ranks = entry.reduce_group.size() if entry.reduce_group is not None else 0
        found |= {name: entry.values.clone(), f"{name}, reduced": torch.tensor([ranks, entry.needs_dp_avg])}
    return found


def compare_routers(name: str, device: str, padded: bool = False, **more) -> None:
    """Megatron's router and the fused one, pass after pass."""
    config = config_of(**ROUTERS[name] | more)
    expected, found = (passes(router_of(config, fuses, device), device, padded) for fuses in (False, True))
    assert expected.keys() == found.keys() and len(found) >= 9
    bound = bound_of(config.params_dtype, device)
    for key, value in expected.items():
        if value.dtype == torch.bool or key == "local_tokens_per_expert":
            assert torch.equal(value, found[key]), f"{name}: {key}"
        else:
            error = relative_rms_error(found[key], value)
            assert error <= bound and found[key].dtype == value.dtype, f"{name}: {key} differs by {error:.3g}"


def compare_bf16_routers(device: str) -> None:
    """With weights in bf16, and buffers, which Megatron's Float16Module does not spare."""
    compare_routers("three losses", device, params_dtype=torch.bfloat16, moe_router_dtype=None)
    compare_routers("expert bias in groups", device, params_dtype=torch.bfloat16)


def layer_of(config, fuses: bool, device: str):
    """X-MoE's layer as the spec builds it."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    from megatron_xmoe.config import XMoEConfig
    from megatron_xmoe.specs import substitute, substitutions

    torch.manual_seed(5)
    config = copy.copy(config)
    config.moe_router_fusion = fuses
    xmoe = XMoEConfig(moe_backend="xmoe", xmoe_grouped_gemm="loop")
    spec = substitute(get_moe_module_spec(use_te=False, num_experts=8), substitutions(config, xmoe))
    layer = spec(config=config, layer_number=1).to(device)
    layer.set_layer_number(1)
    assert type(layer.router).__name__ == ("FusedRouter" if fuses else "TopKRouter")
    return layer


def compare_layers(device: str) -> None:
    """The layer's output and all its gradients, with fusion and without, and recomputed."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    results, weights = [], None
    for fuses, recomputes in ((False, False), (True, False), (True, True)):
        options = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if recomputes else {}
        layer = layer_of(config_of(**ROUTERS["expert bias in groups"], **options), fuses, device)
        weights = weights or layer.state_dict()
        layer.load_state_dict(weights)
        MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(3.0, device=device)
        hidden = torch.randn(24, 2, HIDDEN, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        output, _ = layer(hidden)
        output.square().sum().backward()
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        counts = {"counts": layer.router.local_tokens_per_expert}
        results.append({"output": output.detach(), "input": hidden.grad} | gradients | counts)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in results[0].items():
            assert relative_rms_error(other[name], value) <= 1e-5, name
    assert results[0]["counts"].sum() == 24 * 2 * 4


def check_refusals() -> None:
    """What there is no kernel for is refused when the router is built, by name."""
    from megatron_xmoe.config import XMoEConfig
    from megatron_xmoe.router import why_not_fused

    served, usual = config_of(moe_router_load_balancing_type="none"), XMoEConfig(moe_backend="xmoe")
    assert why_not_fused(served, 8, usual) == ""
    assert "9000 experts are more" in why_not_fused(served, 9000, usual)
    for options, words in (
        ({"moe_router_load_balancing_type": "sinkhorn"}, "--moe-router-load-balancing-type sinkhorn"),
        ({"moe_router_load_balancing_type": ["quantile_balancing"]}, "type quantile_balancing"),
        ({"moe_enable_routing_replay": True}, "--moe-enable-routing-replay"),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 1}, "1 groups of 2 experts have no place for 3"),
        ({"moe_router_num_groups": 8, "moe_router_group_topk": 4}, "4 groups of 1 experts have no place for 3"),
    ):
        changed = copy.copy(served)
        vars(changed).update(options)
        assert words in why_not_fused(changed, 8, usual), options
    assert "--xmoe-router-fusion off" in why_not_fused(served, 8, replace(usual, xmoe_router_fusion="off"))
    assert "--xmoe-group-score max" in why_not_fused(served, 8, replace(usual, xmoe_group_score="max"))
    assert "--xmoe-kernels reference" in why_not_fused(served, 8, replace(usual, xmoe_kernels="reference"))


def run_interpreted(calls: list[tuple[str, str, tuple]], layouts: tuple[dict, ...] = ({},)) -> dict[str, str]:
    """Runs functions of this module, given by a label, a name and arguments, in each layout of Megatron's groups.

    In a process whose environment asks for Triton's interpreter. Returns the tracebacks of those that fail, by label.
    """
    import harness
    from interpreter import mend_interpreter

    mend_interpreter()
    failures = {}
    for layout in layouts:
        with harness.model_parallel(**layout):
            for label, name, arguments in calls:
                try:
                    globals()[name](*arguments)
                except Exception:
                    failures[label] = f"{layout}: {traceback.format_exc()}"
    return failures
