"""torch's Adam as one kernel: who gets it, that its checkpoints are those of the unfused one, and that both go on.

Megatron builds the optimizers, with and without a GPU that is only claimed: the fused kernel runs on a CPU, too.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from tolerances import relative_rms_error
from torch._subclasses.fake_tensor import FakeTensorMode

KINDS = ("Adam", "AdamW")
SHAPES = [[(5, 3), (7,)], [(4,)]]  # of the parameters of two groups
KERNELS = {"Adam": "_fused_adam_", "AdamW": "_fused_adamw_"}
OTHER = "cuda" if torch.cuda.is_available() else "xpu"
"""A device of tensors that are only described. Where there is a GPU, torch wants a tensor there all the same."""


@pytest.fixture
def build(monkeypatch):
    """Builds an optimizer as Megatron does, for a machine with a GPU or without."""
    import megatron.core.optimizer as megatron

    from megatron_xmoe.platform import wheel

    wheel.install()
    monkeypatch.setattr(megatron, "USING_PYTORCH_OPTIMIZER", True)  # also where Apex or Transformer Engine is

    def optimizer(kind: str, gpu: bool, device: str = "cpu") -> torch.optim.Optimizer:
        rules = {"optimizer": "sgd" if kind == "SGD" else "adam", "decoupled_weight_decay": kind == "AdamW"}
        config = megatron.OptimizerConfig(lr=0.01, weight_decay=0.1, **rules)
        groups = [
            {"params": [torch.nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel(), device=device).view(shape))
                        for shape in shapes], "wd_mult": factor}
            for shapes, factor in zip(SHAPES, (1.0, 0.0), strict=True)
        ]  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda: gpu)
            built = megatron._get_megatron_optimizer_based_on_param_groups(
                config, [], groups, pg_collection=SimpleNamespace(tp=None, expt_tp=None)
            )
        return built.optimizer

    return optimizer


@pytest.fixture
def fused_calls(monkeypatch):
    """The kernels that ran, by name."""
    calls = []

    def recorded(name: str):
        original = getattr(torch, name)
        return lambda *args, **kwargs: (calls.append(name), original(*args, **kwargs))[1]

    for name in KERNELS.values():
        monkeypatch.setattr(torch, name, recorded(name))
    return calls


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps with gradients that depend on the number of the step only."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        optimizer.step()


def resume(optimizer: torch.optim.Optimizer, saved: dict, values: list[torch.Tensor]) -> None:
    """Load what was saved, parameters and all."""
    with torch.no_grad():
        for parameter, value in zip(parameters(optimizer), values, strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(saved)


def assert_same_parameters(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    for one, other in zip(parameters(actual), parameters(expected), strict=True):
        assert relative_rms_error(one, other) <= 1e-6


@pytest.mark.parametrize("kind", [*KINDS, "SGD"])
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_who_is_fused(build, fused_calls, kind, gpu):
    optimizer = build(kind, gpu)
    assert type(optimizer).__name__ == kind
    flags = [(group["fused"], group["foreach"]) for group in optimizer.param_groups]
    fused = gpu and kind in KINDS
    assert flags == [(True, False) if fused else (None, None)] * 2
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == fused
    assert len(optimizer._optimizer_state_dict_post_hooks) == fused
    train(optimizer, range(1))
    assert fused_calls == [KERNELS[kind]] * 2 if fused else not fused_calls


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_does_not_change(build, kind):
    fused, unfused = build(kind, True), build(kind, False)
    for optimizer in (fused, unfused):
        train(optimizer, range(2))
    actual, expected = fused.state_dict(), unfused.state_dict()
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys() == {0, 1, 2}
    for number, state in expected["state"].items():
        assert actual["state"][number].keys() == state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, tensor in state.items():
            saved = actual["state"][number][name]
            assert (saved.shape, saved.dtype, saved.device) == (tensor.shape, tensor.dtype, tensor.device)
            assert relative_rms_error(saved, tensor) <= 1e-6
        assert actual["state"][number]["step"] == 2
    assert all(group["fused"] and group["foreach"] is False for group in fused.param_groups), "saving changed the run"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [True, False], ids=["saved fused", "saved unfused"])
@pytest.mark.parametrize("after", [True, False], ids=["goes on fused", "goes on unfused"])
def test_going_on(build, fused_calls, kind, before, after, device):
    whole = build(kind, False, device)
    train(whole, range(6))
    first, second = build(kind, before, device), build(kind, after, device)
    train(first, range(3))
    saved, values = copy.deepcopy(first.state_dict()), [parameter.detach().clone() for parameter in parameters(first)]
    fused_calls.clear()
    resume(second, saved, values)
    train(second, range(3, 6))
    assert fused_calls == [KERNELS[kind]] * 6 * after
    assert_same_parameters(second, whole)
    assert {int(state["step"]) for state in second.state.values()} == {6}


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_count_is_where_it_belongs(build, kind):
    """On another device than the CPU, which needs no such device: nothing is computed."""
    with FakeTensorMode():
        first, second = (build(kind, fused, OTHER) for fused in (True, False))
        for optimizer in (first, second):
            train(optimizer, range(1))
        saved = first.state_dict()
        assert {state["step"].device.type for state in saved["state"].values()} == {"cpu"}
        assert {state["exp_avg"].device.type for state in saved["state"].values()} == {OTHER}
        assert {state["step"].device.type for state in first.state.values()} == {OTHER}, "saving changed the run"
        for source in (first, second):
            resumed = build(kind, True, OTHER)
            resumed.load_state_dict(source.state_dict())
            assert {state["step"].device.type for state in resumed.state.values()} == {OTHER}
        second.load_state_dict(saved)
        assert {state["step"].device.type for state in second.state.values()} == {"cpu"}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_described_before_the_first_step(build, kind, fused):
    """What the distributed optimizer allocates then is what the first step would have."""
    from megatron_xmoe.platform import wheel

    described = wheel._allocate_state_before_it_is_described(lambda self: None)
    with FakeTensorMode():
        inner, stepped = (build(kind, fused, OTHER) for _ in range(2))
        described(SimpleNamespace(optimizer=inner))
        train(stepped, range(1))
        for parameter, expected in zip(inner.state.values(), stepped.state.values(), strict=True):
            assert parameter.keys() == expected.keys()
            for name, tensor in parameter.items():
                assert (tensor.device, tensor.dtype, tensor.shape) == (
                    expected[name].device, expected[name].dtype, expected[name].shape
                ), name  # fmt: skip
