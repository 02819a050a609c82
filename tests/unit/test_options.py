"""Every option of Megatron's parser that concerns experts is accounted for, and what is not served is refused."""

import argparse
import warnings

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_xmoe.training import options
from megatron_xmoe.training.arguments import add_xmoe_arguments, parse
from megatron_xmoe.training.defaults import adjust
from megatron_xmoe.training.errors import UsageError
from megatron_xmoe.training.options import check_options

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TABLES = {name: set(getattr(options, name)) for name in ("SERVED", "REFUSED", "LIMITED", "UNRELATED", "UNAVAILABLE")}


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
    concerned = {dest for dest in MEGATRONS if options.CONCERNS_EXPERTS.search(dest)}
    assert len(concerned) > 100
    missing = sorted(concerned - set.union(*TABLES.values()))
    assert not missing, f"say in training/options.py what becomes of {missing}"


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
    action, refusal = MEGATRONS[dest], options.REFUSED[dest]
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
    with pytest.raises(UsageError, match=r"--moe-backend xmoe does not take --mtp-num-layers 2: .* Fix: "):
        check(arguments(mtp_num_layers=2), "mtp_num_layers")


# option -> (arguments that are not served, arguments that are)
LIMITS = {
    "moe_token_dispatcher_type": ({"moe_token_dispatcher_type": "flex"}, {}),
    "ckpt_format": ({"ckpt_format": "torch"}, {"ckpt_format": "torch_dist"}),
    "moe_pad_expert_input_to_capacity": ({"moe_pad_expert_input_to_capacity": True}, {}),
    "expert_tensor_parallel_size": ({"expert_tensor_parallel_size": 2}, {"expert_tensor_parallel_size": 1}),
    "moe_router_load_balancing_type": (
        {"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]},
        {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"]},
    ),
    "recompute_granularity": ({"recompute_granularity": "selective"}, {"recompute_granularity": "full"}),
    "recompute_activations": ({"recompute_activations": True}, {}),
    "sequence_parallel": (
        {"tensor_model_parallel_size": 2, "sequence_parallel": False},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


@pytest.mark.parametrize("dest", sorted(TABLES["LIMITED"]))
def test_limited_option(dest):
    assert dest in LIMITS, f"say in LIMITS which values of {dest} are served"
    refused, served = LIMITS[dest]
    rule, _, fix = options.LIMITED[dest]
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
    refusal = options.UNAVAILABLE[dest]
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
        ("--moe-expert-capacity-factor 1.5", "--moe-expert-capacity-factor 1.5:"),
        ("--moe-token-dispatcher-type allgather", "--moe-token-dispatcher-type allgather:"),
    ],
)
def test_a_refused_option_of_a_command_line(monkeypatch, flag, shown):
    args, given, defaults = parsed(monkeypatch, f"--moe-backend xmoe --num-experts 8 {flag}")
    with pytest.raises(UsageError, match=f"--moe-backend xmoe does not take {shown}"):
        check_options(args, defaults)


@pytest.mark.parametrize("backend", ["megatron", "xmoe"])
def test_prediction_of_several_tokens_over_pipeline_stages(backend):
    args = argparse.Namespace(**{**DEFAULTS, "moe_backend": backend, "mtp_num_layers": 1})
    args.pipeline_model_parallel_size = 2
    with pytest.raises(UsageError, match="--mtp-num-layers 1.*Fix: "):
        check_options(args, DEFAULTS)
