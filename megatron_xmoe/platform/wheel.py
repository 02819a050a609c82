"""What the megatron-core wheel does not do as shipped, on a GPU or not: index builder, exact resume, fused Adam.
"""

import functools
import importlib.util

import torch

from megatron_xmoe.platform.patching import Replacement, apply


def install() -> list[Replacement]:
    """Put the repairs in place; a second call changes nothing. Returns what is in place, for the start-up report.

    Raises:
        RuntimeError: a symbol to replace does not exist in the installed version.
    """
    apply(REPLACEMENTS)
    return list(REPLACEMENTS)


def _compile_only_when_missing(original):
    @functools.wraps(original)
    def compile_helpers():
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


def _allocate_state_before_it_is_described(original):
    """DistributedOptimizer.state_dict for torch's Adam, also before the first step.

    A resume describes the state that it is about to load, and stock Megatron asserts that torch's optimizer has
    exactly one step count by then. Before the first step it has no state at all: give every parameter the state
    that its first step would have made, with 0 steps done. The values are overwritten by what is loaded; where a run
    saves before its first step, that goes on with them.
    """

    @functools.wraps(original)
    def state_dict(self):
        inner = self.optimizer
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and not inner.state:
            for group in inner.param_groups:
                for parameter in group["params"]:
                    where = parameter.device if group["fused"] else "cpu"
                    inner.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=where),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return original(self)

    return state_dict


def _step_count_of_its_own(original):
    """DistributedOptimizer.load_state_dict, after which every parameter has its own step count.

    The stock function puts one tensor into every parameter's state; torch's Adam increments it in place, once per
    parameter, so that the bias correction after a resume would be that of a much later step.
    """

    @functools.wraps(original)
    def load_state_dict(self, state_dict):
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    return load_state_dict


def _step_count_is_not_sharded(original):
    """The loader of one parameter's states, told that a missing step count is no tensor to copy.

    It walks over all tensors of the optimizer's state; torch's Adam keeps the step count among them, and what is
    loaded per parameter does not contain it (load_state_dict restores it before).
    """

    @functools.wraps(original)
    def set_states(self, model_param, tensors):
        return original(self, model_param, {"step": None, **tensors})

    return set_states


def _fused_on_a_gpu(original):
    """Builds the optimizer as Megatron does, and lets torch's Adam update all parameters in one kernel on a GPU.

    Megatron gives torch's Adam no choice of implementation, and the default makes several passes over parameters and
    states. What is saved is what an unfused Adam saves, so that a checkpoint goes on fused or not, as the machine has
    it, whatever it was saved with.
    """

    @functools.wraps(original)
    def build(*args, **kwargs):
        built = original(*args, **kwargs)
        inner = getattr(built, "optimizer", None)
        if torch.cuda.is_available() and isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            _fuse(inner)
            inner.register_load_state_dict_post_hook(_fuse)
            inner.register_state_dict_post_hook(_describe_as_unfused)
        return built

    return build


def _fuse(adam: torch.optim.Adam) -> None:
    for group in adam.param_groups:
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            step = adam.state[parameter].get("step") if parameter in adam.state else None
            if torch.is_tensor(step):
                adam.state[parameter]["step"] = step.to(parameter.device)


def _describe_as_unfused(adam: torch.optim.Adam, described: dict) -> None:
    """Takes the marks of the fused Adam out of what its state_dict() returns; the optimizer itself stays as it is.

    torch obeys the flags of a loaded state, also where no GPU is. Megatron's plain optimizer saves the step count
    as the tensor that it is: on a GPU it needs one to be read, and each rank's differs from rank 0's by its device.
    """
    for group in described["param_groups"]:
        group.update({name: adam.defaults[name] for name in ("fused", "foreach")})
    for number, state in described["state"].items():
        if torch.is_tensor(step := state.get("step")):
            described["state"][number] = {**state, "step": step.cpu()}


def _keeping_random_state(original):
    """Builds the data iterators without a trace in torch's random state.

    A data loader draws a seed from the CPU's generator. A run builds its loaders once, but at another point after a
    resume than from the start: the states would differ from there on, and on a CPU the dropout masks with them.
    """

    @functools.wraps(original)
    def build(*args, **kwargs):
        state = torch.get_rng_state()
        try:
            return original(*args, **kwargs)
        finally:
            torch.set_rng_state(state)

    return build


def _like_the_decoder(original):
    """The spec of the layers that predict further tokens, treated as the decoder's where that is known how."""

    @functools.wraps(original)
    def mtp_block_spec(config, *args, **kwargs):
        spec = original(config, *args, **kwargs)
        treat = getattr(config.transformer_layer_spec, "of_other_blocks", None)
        return treat(config, spec) if treat is not None and spec is not None else spec

    return mtp_block_spec


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_RESUME = "the distributed optimizer cannot resume with torch's Adam"

REPLACEMENTS = [
    Replacement(
        "megatron.core.datasets.utils:compile_helpers",
        _compile_only_when_missing,
        "the wheel ships the compiled index builder, but not the Makefile that Megatron runs for it",
    ),
    Replacement(f"{_OPTIMIZER}.state_dict", _allocate_state_before_it_is_described, _RESUME),
    Replacement(f"{_OPTIMIZER}.load_state_dict", _step_count_of_its_own, _RESUME),
    Replacement(f"{_OPTIMIZER}._set_main_param_and_optimizer_states", _step_count_is_not_sharded, _RESUME),
    Replacement(
        "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups",
        _fused_on_a_gpu,
        "torch's Adam is not fused by default, and Megatron leaves it at that",
    ),
    Replacement(
        "megatron.training.training:build_train_valid_test_data_iterators",
        _keeping_random_state,
        "the random state after a resume is not that of the run in one go",
    ),
    Replacement(
        "megatron.training.models.gpt:mtp_block_spec",
        _like_the_decoder,
        "it builds the layers for further tokens from the stock spec, whatever the decoder's spec is",
    ),
]
