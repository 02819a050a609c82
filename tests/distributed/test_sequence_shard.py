"""Sequence-sharded blocks: one process and any tensor-parallel layout give the same loss and gradients, in fp64."""

import harness
import pytest
from shard_cases import Case, Layout, reference_of, run_all, whole
from tolerances import relative_rms_error

BOUND = 1e-10  # relative RMS error of each tensor
TP2_EP2 = Layout(2, 2)
LAYOUTS = [TP2_EP2, Layout(2, 1), Layout(2, 4), Layout(4, 1), Layout(4, 2), Layout(4, 4)]
SHARDED_EXPERTS = [Layout(2, 1, 2), Layout(2, 2, 2), Layout(4, 2, 2), Layout(4, 1, 4), Layout(4, 1, 2)]

SIGMOID = ("moe_router_score_function", "sigmoid")
BIAS = (SIGMOID, ("moe_router_enable_expert_bias", True), ("moe_router_bias_update_rate", 0.01))
LOSSES = (
    ("moe_router_load_balancing_type", ("aux_loss", "seq_aux_loss")),
    ("moe_aux_loss_coeff", (0.1, 0.2)),
)
GLOBAL = (("moe_router_load_balancing_type", "global_aux_loss"), ("moe_aux_loss_coeff", 0.3))
NONE = (("moe_router_load_balancing_type", "none"), ("moe_aux_loss_coeff", 0.0))
PER_TOKEN = ("calculate_per_token_loss", True)
RECOMPUTE = (("recompute_granularity", "selective"), ("recompute_modules", ("moe",)))
FULL = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1))
GATE = ("moe_shared_expert_gate", True)
OVERLAP = ("moe_shared_expert_overlap", True)

PLAIN = Case("plain")
CASES = [
    PLAIN,
    Case("losses", LOSSES),
    Case("losses per token", (*LOSSES, PER_TOKEN)),
    Case("global loss", GLOBAL),
    Case("uneven, global loss per token", (*GLOBAL, PER_TOKEN), length=7),
    Case("uneven", length=7),
    Case("uneven, losses", LOSSES, length=7),
    Case("uneven, losses per token", (*LOSSES, PER_TOKEN), length=5),
    Case("fewer positions than ranks", length=3, options=LOSSES),
    Case("padding", LOSSES, padded=3),
    Case("padding per token", (*LOSSES, PER_TOKEN), padded=3),
    Case("expert bias", (*BIAS, ("moe_router_load_balancing_type", "none"), ("moe_aux_loss_coeff", 0.0))),
    Case("uneven, expert bias", BIAS, length=7),
    Case("gate with bias", gate_bias=True),
    Case("logits as weights", logits=True),
    Case("uneven, logits as weights", logits=True, length=7),
    Case("sinkhorn", (("moe_router_load_balancing_type", "sinkhorn"), ("moe_aux_loss_coeff", 0.0))),
    Case(
        "quantile balancing",
        (("moe_router_load_balancing_type", "quantile_balancing"), ("moe_aux_loss_coeff", 0.0)),
    ),
    Case(
        "uneven, quantile balancing",
        (("moe_router_load_balancing_type", "quantile_balancing"), ("moe_aux_loss_coeff", 0.0)),
        length=12,
    ),
    Case("recomputed block", (*LOSSES, *RECOMPUTE)),
    Case("recomputed layer", (*LOSSES, *FULL)),
    Case("recomputed block, uneven", (*LOSSES, *RECOMPUTE), length=7),
    Case("shared expert", shared="tensor"),
    Case("shared expert with gate", (GATE,), shared="tensor"),
    Case("shared expert, uneven", (GATE,), shared="tensor", length=7),
    Case("shared expert, overlapped", (GATE, OVERLAP), shared="tensor"),
    Case("shared expert, overlapped, uneven", (GATE, OVERLAP), shared="tensor", length=7),
    Case("shared expert, recomputed", (GATE, *RECOMPUTE), shared="tensor"),
    Case("whole shared expert", shared="sequence"),
    Case("whole shared expert with gate, uneven", (GATE,), shared="sequence", length=7),
    Case("whole shared expert, overlapped", (GATE, OVERLAP), shared="sequence"),
    Case("whole shared expert, recomputed", (GATE, *RECOMPUTE, PER_TOKEN), shared="sequence"),
    Case(
        "whole shared expert, recomputed alone",
        (("recompute_granularity", "selective"), ("recompute_modules", ("shared_experts",))),
        shared="sequence",
    ),
]
EVERYWHERE = ("plain", "losses per token", "uneven, losses", "shared expert with gate")


def modes_of(case: Case, layout: Layout) -> tuple[str, ...]:
    """What can be compared: whole shared experts need a sharded sequence and whole experts.

    Megatron's global loss depends on the number of data-parallel ranks, with one process it has one.
    """
    if "global" in case.name and layout.tp < 4:
        return ()
    if case.shared == "sequence":
        return ("on",) if layout.etp == 1 else ()
    return "on", "off"


RUNS = [
    (case, layout, mode)
    for case in CASES
    for layout in [*LAYOUTS, *SHARDED_EXPERTS]
    for mode in modes_of(case, layout)
    if case.name in EVERYWHERE or layout in (TP2_EP2, Layout(4, 4), Layout(4, 2, 2))
]
# Megatron's own sharding, with our layer and with whole shared experts, which it does not have
RUNS += [(case, TP2_EP2, "sp") for case in CASES if case.name in ("plain", "losses", "whole shared expert")]


def is_slow(case: Case, layout: Layout) -> bool:
    """Whether a run is left to --slow: every case is tried in one layout, a few in the others."""
    return layout != TP2_EP2 and (case.name not in EVERYWHERE or layout in (Layout(4, 1), Layout(4, 1, 2)))


PARAMETERS = [
    pytest.param(*run, id=f"{run[0]}, {run[1]}, {run[2]}", marks=[pytest.mark.slow] * is_slow(*run[:2]))
    for run in RUNS
]


@pytest.fixture(scope="module")
def computed(request) -> dict:
    """What each rank computed, by run; only of the runs that this call needs."""
    slow = request.config.getoption("--slow")
    runs = [run for run in RUNS if slow or not is_slow(*run[:2])]
    references = dict.fromkeys((reference_of(case), Layout(), "auto") for case, _, _ in runs)
    (alone,) = harness.run_distributed(run_all, 1, [*references], timeout=300)
    ranks = harness.run_distributed(run_all, 4, runs, timeout=900)
    return {run: [result] for run, result in alone.items()} | {run: [rank[run] for rank in ranks] for run in runs}


@pytest.mark.parametrize("case, layout, mode", PARAMETERS)
def test_layout_changes_nothing(computed, case, layout, mode):
    """Loss, gradient of the input and of every parameter, and the parameters and buffers after a step."""
    (reference,), ranks = computed[reference_of(case), Layout(), "auto"], computed[case, layout, mode]
    assert all(abs(rank.loss - reference.loss) <= 1e-12 * abs(reference.loss) for rank in ranks)
    for what in ("gradients", "state"):
        expected = whole([getattr(reference, what)])
        actual = whole([getattr(rank, what) for rank in ranks])
        assert actual.keys() == expected.keys() and len(actual) >= 7
        for name, tensor in expected.items():
            error = relative_rms_error(actual[name], tensor)
            assert tensor.norm() > 0 and error < BOUND, f"{what} of {name}: {error}"
    for rank in ranks:
        index, size = rank.data_rank
        assert relative_rms_error(rank.inputs, reference.inputs[index::size]) < BOUND
