"""Sequence-sharded blocks: one process and any tensor-parallel layout give the same loss and gradients, in fp64."""

import harness
import pytest
from shard_cases import TOPK, B, Case, Layout, reference_of, run_all, run_checks, whole
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
    Case("redundancy bypassed", LOSSES, dispatcher="rbd"),
    Case("redundancy bypassed, shared expert overlapped", (GATE, OVERLAP), shared="tensor", dispatcher="rbd"),
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


SELECTED = (TP2_EP2, Layout(4, 4), Layout(4, 2, 2))
WITH_NODES = (Layout(2, 4), Layout(4, 4))
RUNS = [
    (case, layout, mode)
    for case in CASES
    for layout in [*LAYOUTS, *SHARDED_EXPERTS]
    for mode in modes_of(case, layout)
    if (layout in WITH_NODES if case.dispatcher == "rbd" else case.name in EVERYWHERE or layout in SELECTED)
]
# Megatron's own sharding, with our layer and with whole shared experts, which it does not have
RUNS += [(case, TP2_EP2, "sp") for case in CASES if case.name in ("plain", "losses", "whole shared expert")]


def is_slow(case: Case, layout: Layout) -> bool:
    """Whether a run is left to --slow: every case is tried in one layout, a few in the others."""
    if case.dispatcher == "rbd":
        return layout != Layout(2, 4)
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


WATCHED = [
    (layout, mode, length)
    for layout in (TP2_EP2, Layout(4, 4), Layout(4, 1), Layout(2, 2, 2), Layout(4, 2, 2))
    for mode in ("on", "off")
    for length in (8, 7, 3)
]
REPLICAS = [
    (TP2_EP2, "on", "tensor", 20),
    (TP2_EP2, "on", "tensor", 100),
    (TP2_EP2, "on", "sequence", 100),
    (TP2_EP2, "off", "tensor", 100),
    (Layout(4, 4), "on", "tensor", 100),
]
SLOW_REPLICAS = REPLICAS[1:]


@pytest.fixture(scope="module")
def checked(request) -> dict:
    """Results by arguments, of each rank."""
    replicas = REPLICAS if request.config.getoption("--slow") else REPLICAS[:1]
    ranks = harness.run_distributed(run_checks, 4, WATCHED, replicas, timeout=900)
    return {run: [rank[run] for rank in ranks] for run in ranks[0]}


@pytest.mark.parametrize("layout, mode, length", WATCHED, ids=lambda value: str(value))
def test_work_of_a_block(checked, layout, mode, length):
    """One gather of the sequence each way; tokens are dispatched, computed and counted as often as the mode says."""
    ranks = [work for work, _ in checked[layout, mode, length]]
    data_parallel, routes = 4 // layout.tp, length * B * TOPK
    copies = 1 if mode == "on" else layout.tp
    assert sum(work.sent for work in ranks) == data_parallel * routes * copies
    # each of the ranks that share an expert computes all its rows, but none twice where they hold the same tokens
    shares = 1 if mode == "off" else layout.etp
    assert sum(work.computed for work in ranks) == data_parallel * routes * copies * shares
    assert all(work.counted == work.sent for work in ranks)
    for work in ranks:
        if mode == "off":
            assert work.gathers == (0, 0)
        elif layout.etp == 1 and length % layout.tp == 0:
            assert work.gathers == (1, 1)
        elif layout.etp == 1:  # the gate sees the whole sequence, and its gradient is gathered as well
            assert work.gathers == (1, 2)


@pytest.mark.parametrize("layout, mode, length", WATCHED, ids=lambda value: str(value))
def test_recorded_routes_are_replayed(checked, layout, mode, length):
    assert all(replayed for _, replayed in checked[layout, mode, length])


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, id=", ".join(map(str, run)), marks=[pytest.mark.slow] * (run in SLOW_REPLICAS))
        for run in REPLICAS
    ],
)
def test_replicas_stay_bit_identical(checked, run):
    """The gate, the norms and what else every tensor-parallel rank holds, after each iteration."""
    for differing in checked[run]:
        assert sum("router" in name for name in differing) == 1 and len(differing) >= 4
        assert differing == dict.fromkeys(differing, 0)
