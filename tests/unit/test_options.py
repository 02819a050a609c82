"""Every option of Megatron's parser that concerns experts is accounted for, and what is not served is refused."""

import argparse
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments
from option_cases import CASES, LAYOUTS, MODEL

from megatron_xmoe.training import checks, data_checks, option_table
from megatron_xmoe.training.arguments import add_xmoe_arguments, parse
from megatron_xmoe.training.defaults import adjust
from megatron_xmoe.training.errors import UsageError
from megatron_xmoe.training.main import check_devices
from megatron_xmoe.training.options import check_options

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TABLES = {
    name: set(getattr(option_table, name)) for name in ("SERVED", "REFUSED", "LIMITED", "UNRELATED", "UNAVAILABLE")
}


def options_of(add_arguments) -> dict[str, argparse.Action]:
    """Destination -> option, of a function that adds options to a parser."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Megatron's, of argparse
        return {action.dest: action for action in add_arguments(argparse.ArgumentParser(add_help=False))._actions}


MEGATRONS = options_of(add_megatron_arguments)
OURS = options_of(add_xmoe_arguments)
DEFAULTS = {dest: action.default for dest, action in (MEGATRONS | OURS).items()}
REFUSED_AND_PARSED = sorted(TABLES["REFUSED"] & MEGATRONS.keys())


def arguments(**changes) -> argparse.Namespace:
    """Megatron's defaults with the X-MoE backend and the dispatcher that is set for it."""
    chosen = {"moe_backend": "xmoe", "moe_token_dispatcher_type": "alltoall"}
    return argparse.Namespace(**DEFAULTS | chosen | changes)


def other_value(action: argparse.Action):
    """A value of an option that is not its default."""
    if action.const is not None:
        return action.const if action.const != action.default else not action.default
    if action.choices:
        value = next(choice for choice in action.choices if choice != action.default)
    elif action.type in (int, float):
        value = action.type((action.default or 0) + 1)
    else:
        value = "other" if action.default != "other" else "another"
    return [value] if action.nargs in ("*", "+") else value


def check(args: argparse.Namespace, *given: str) -> None:
    """Check as the program does, for a command line that gives these destinations."""
    check_options(args, DEFAULTS)


def test_every_option_about_experts_is_in_a_table():
    concerned = {dest for dest in MEGATRONS if option_table.CONCERNS_EXPERTS.search(dest)}
    assert len(concerned) > 100
    missing = sorted(concerned - set.union(*TABLES.values()))
    assert not missing, f"say in training/option_table.py what becomes of {missing}"


@pytest.mark.parametrize("name", TABLES)
def test_every_entry_is_an_option(name):
    stale = sorted(TABLES[name] - DEFAULTS.keys())
    assert not stale, f"{name} lists what is no option any more: {stale}"


def test_no_option_is_in_two_tables():
    places = {dest: [n for n, table in TABLES.items() if dest in table] for dest in set.union(*TABLES.values())}
    doubled = {dest: names for dest, names in places.items() if len(names) > 1}
    assert not doubled


@pytest.mark.parametrize("dest", REFUSED_AND_PARSED)
def test_refused_option(dest):
    action, refusal = MEGATRONS[dest], option_table.REFUSED[dest]
    value = other_value(action)
    with pytest.raises(UsageError) as raised:
        check(arguments(**{dest: value}), dest)
    words = str(raised.value).replace(":", " ").split()
    assert set(action.option_strings) & set(words), f"the message names no option that exists: {raised.value}"
    assert refusal.reason in str(raised.value)
    assert str(raised.value).endswith(f"Fix: {refusal.way_out}")
    check(arguments(**{dest: value}, moe_backend="megatron"), dest)  # Megatron's own layer takes it
    check(arguments(), dest)  # given, with its default


def test_refusal_shows_the_value():
    with pytest.raises(UsageError, match=r"--moe-backend xmoe does not take --moe-latent-size 8: .* Fix: "):
        check(arguments(moe_latent_size=8), "moe_latent_size")


def test_every_served_option_is_shown():
    """The cases that a table names change the option, and have every value that it can take."""
    parser = add_xmoe_arguments(add_megatron_arguments(argparse.ArgumentParser(add_help=False)))
    shown = option_table.SERVED | {name: limit.shown_by for name, limit in option_table.LIMITED.items()}
    for dest, cases in shown.items():
        values = [value for case in cases for value in values_in_case(parser, case, dest)]
        assert not cases or any(value != DEFAULTS[dest] for value in values), f"{cases} do not change {dest}"
        choices = set((MEGATRONS | OURS)[dest].choices or ()) if dest in option_table.SERVED else set()
        assert choices <= {one for value in values for one in as_list(value)}, f"{dest}: {cases} have only {values}"


def values_in_case(parser: argparse.ArgumentParser, case: str, dest: str) -> list:
    """The values that an option has in a case, in its layouts."""
    commands = [
        [*MODEL, *CASES[case].options.split(), *LAYOUTS[layout][1].split()] for layout in CASES[case].layouts
    ]
    return [getattr(parser.parse_args(command), dest) for command in commands]


def as_list(value) -> list:
    """A list option's values, or the only value."""
    return value if isinstance(value, list) else [value]


def test_every_case_shows_something():
    """No case is left behind when a table changes."""
    named = {case for cases in option_table.SERVED.values() for case in cases}
    named |= {case for limit in option_table.LIMITED.values() for case in limit.shown_by}
    assert not CASES.keys() ^ named


def test_page_is_fresh():
    command = [sys.executable, str(ROOT / "tools" / "render_options.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# option -> (arguments that are not served, arguments that are)
LIMITS = {
    "moe_token_dispatcher_type": ({"moe_token_dispatcher_type": "flex"}, {}),
    "ckpt_format": ({"ckpt_format": "torch"}, {"ckpt_format": "torch_dist"}),
    "moe_pad_expert_input_to_capacity": ({"moe_pad_expert_input_to_capacity": True}, {}),
    "moe_apply_probs_on_input": (
        {"moe_apply_probs_on_input": True, "moe_router_topk": 2},
        {"moe_apply_probs_on_input": True, "moe_router_topk": 1},
    ),
    "optimizer": ({"optimizer": "muon"}, {"optimizer": "sgd"}),
    "recompute_modules": (
        {"recompute_modules": ["moe", "moe_act"]},
        {"recompute_modules": ["moe", "core_attn", "mlp", "shared_experts"]},
    ),
    "moe_router_force_load_balancing": (
        {"moe_router_force_load_balancing": True, "tensor_model_parallel_size": 2},  # experts on both ranks
        {"moe_router_force_load_balancing": True, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "moe_router_fusion": (  # test_fused_router.py has what is served, where Triton runs
        {"moe_router_fusion": True, "num_experts": 8, "moe_enable_routing_replay": True},
        {"moe_enable_routing_replay": True},
    ),
}


@pytest.mark.parametrize("dest", sorted(TABLES["LIMITED"]))
def test_limited_option(dest):
    assert dest in LIMITS, f"say in LIMITS which values of {dest} are served"
    refused, served = LIMITS[dest]
    rule, fix = option_table.LIMITED[dest].rule, option_table.LIMITED[dest].way_out
    with pytest.raises(UsageError) as raised:
        check(arguments(**refused), *refused)
    words = str(raised.value).replace(":", " ").split()
    assert set(MEGATRONS[dest].option_strings) & set(words)
    assert rule in str(raised.value) and str(raised.value).endswith(f"Fix: {fix}")
    check(arguments(**served), *served)
    check(arguments(**refused, moe_backend="megatron"), *refused)


@pytest.mark.parametrize("backend", ["xmoe", "megatron"])
@pytest.mark.parametrize("dest", sorted(TABLES["UNAVAILABLE"]))
def test_unavailable_option(dest, backend):
    refusal = option_table.UNAVAILABLE[dest]
    with pytest.raises(UsageError) as raised:
        check(arguments(**{dest: other_value(MEGATRONS[dest])}, moe_backend=backend), dest)
    words = str(raised.value).replace(":", " ").split()
    assert set(MEGATRONS[dest].option_strings) & set(words)
    assert refusal.reason in str(raised.value) and str(raised.value).endswith(f"Fix: {refusal.way_out}")


@pytest.mark.parametrize("backend", ["xmoe", "megatron"])
def test_defaults_pass(backend):
    check(arguments(moe_backend=backend))


def parsed(monkeypatch, command: str) -> tuple[argparse.Namespace, set[str], dict]:
    """The command line, parsed and adjusted as the program does."""
    monkeypatch.setattr("sys.argv", ["pretrain_xmoe.py", *command.split()])
    args, given, defaults = parse()
    adjust(args, given, on_cpu=True)
    return args, given, defaults


def test_an_ordinary_command_line_passes(monkeypatch):
    command = (
        "--moe-backend xmoe --num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --moe-ffn-hidden-size 64"
    )
    args, given, defaults = parsed(
        monkeypatch, f"{command} --expert-model-parallel-size 4 --recompute-granularity full"
    )
    assert given >= {"moe_backend", "num_experts", "moe_router_topk", "recompute_granularity"}
    assert "moe_z_loss_coeff" not in given
    check_options(args, defaults)


@pytest.mark.parametrize(
    ("flag", "shown"),
    [
        ("--moe-grouped-gemm", "--moe-grouped-gemm:"),
        ("--recompute-modules moe_act", "--recompute-modules moe_act:"),
        ("--moe-token-dispatcher-type allgather", "--moe-token-dispatcher-type allgather:"),
    ],
)
def test_a_refused_option_of_a_command_line(monkeypatch, flag, shown):
    args, given, defaults = parsed(monkeypatch, f"--moe-backend xmoe --num-experts 8 {flag}")
    with pytest.raises(UsageError, match=f"--moe-backend xmoe does not take {shown}"):
        check_options(args, defaults)


@pytest.mark.parametrize("change", [{"xmoe_pilot": "first"}, {"xmoe_rbd_overlap": "off"}])
def test_details_of_rbd_without_it(change):
    with pytest.raises(UsageError, match=r"--xmoe-dispatcher alltoall does not take --xmoe-(pilot|rbd-overlap) "):
        check(arguments(xmoe_dispatcher="alltoall", **change), *change)
    for dispatcher in ("auto", "rbd"):
        check(arguments(xmoe_dispatcher=dispatcher, **change), *change)


@pytest.mark.parametrize("option", ["xmoe_min_capacity", "moe_token_drop_policy"])
def test_dropping_needs_a_capacity(option):
    changes = {"xmoe_min_capacity": 4} if option == "xmoe_min_capacity" else {"moe_token_drop_policy": "position"}
    with pytest.raises(UsageError, match=r"nothing is dropped without a capacity. Fix: add --moe-expert-capacity"):
        check(arguments(**changes))
    check(arguments(**changes, moe_expert_capacity_factor=1.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"xmoe_min_capacity": 4},
        {"xmoe_router_fusion": "off"},
        {"xmoe_rope_fusion": "off"},
        {"xmoe_combine_weights": "logits"},
        {"xmoe_group_score": "max"},
        {"xmoe_metrics": "layers"},
        {"xmoe_profile_breakdown": True},
        {"xmoe_ranks_per_node": "2"},
        {"xmoe_sequence_shard": "on"},
        {"xmoe_shared_expert": "sequence"},
    ],
)
def test_options_of_our_layer_need_it(changes):
    (option,) = changes
    with pytest.raises(UsageError, match=f"--moe-backend megatron does not take --{option.replace('_', '-')}"):
        check(arguments(**changes, moe_backend="megatron", moe_expert_capacity_factor=1.0))


def test_a_negative_capacity_is_refused():
    with pytest.raises(UsageError, match="--xmoe-min-capacity -1: .* Fix: give 0 or more"):
        check(arguments(xmoe_min_capacity=-1, moe_expert_capacity_factor=1.0))


def test_replayed_routes_are_not_scored():
    with pytest.raises(UsageError, match="--xmoe-group-score max does not take --moe-enable-routing-replay"):
        check(arguments(moe_enable_routing_replay=True, xmoe_group_score="max"))


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"moe_shared_expert_intermediate_size": None}, "add --moe-shared-expert-intermediate-size"),
        ({"expert_tensor_parallel_size": 2}, "add --expert-tensor-parallel-size 1"),
        ({"xmoe_sequence_shard": "off"}, "use --xmoe-sequence-shard on"),
    ],
)
def test_whole_shared_experts_need_a_sharded_sequence(changes, fix):
    served = {"xmoe_shared_expert": "sequence", "moe_shared_expert_intermediate_size": 16,
              "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}  # fmt: skip
    check(arguments(**served))
    check(arguments(**served, sequence_parallel=True))
    check(arguments(**served | {"tensor_model_parallel_size": 1}))
    with pytest.raises(UsageError, match=f"does not take --xmoe-shared-expert sequence: .* Fix: {fix}"):
        check(arguments(**served | changes))


def test_every_process_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for local_rank, processes in (("0", "2"), ("1", "2"), ("1", None)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes) if processes else monkeypatch.delenv("LOCAL_WORLD_SIZE")
        check_devices()
    for local_rank, processes in (("0", "3"), ("2", None)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes) if processes else monkeypatch.delenv("LOCAL_WORLD_SIZE")
        with pytest.raises(UsageError, match="3 processes on this machine, and torch finds 2 .* --nproc-per-node 2"):
            check_devices()


def test_a_checkpoint_without_biases():
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_experts", "moe_ffn_hidden_size")
    shape = dict.fromkeys(names, 4)
    saved = argparse.Namespace(**shape | {"add_bias_linear": False})
    checks._compare(argparse.Namespace(**vars(saved)), saved, "--load DIR", None)
    with pytest.raises(UsageError, match="add_bias_linear False, this run has True. .*--disable-bias-linear"):
        checks._compare(argparse.Namespace(**shape | {"add_bias_linear": True}), saved, "--load DIR", None)


def test_parts_of_the_data_that_are_gone_through_until_there_are_enough_samples():
    ends = {"train": (0, 0.9), "valid": (0.9, 1.0)}
    assert data_checks._parts("90,10,0", ["a"], None) == ends
    assert data_checks._parts("90,10,0", ["a", "b"], [1.0, 1.0]) == ends
    assert data_checks._parts("90,10,0", ["a", "b", "c"], None) == {}
    with pytest.raises(UsageError, match="--split is missing"):
        data_checks._parts(None, ["a"], None)
    data_checks._check_parts("a", 10, ends, "90,10,0")
    with pytest.raises(UsageError, match="no document for the valid part of a, which has 4"):
        data_checks._check_parts("a", 4, ends, "90,10,0")
