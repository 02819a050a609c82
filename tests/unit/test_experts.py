"""Grouped experts against Megatron's SequentialMLP: outputs, every gradient, and what a checkpoint holds."""

from functools import partial
from types import SimpleNamespace

import harness
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close, assert_same

EXPERTS, HIDDEN, FFN = 4, 12, 10  # no multiples of 8: nothing may depend on that
ROWS = {"uneven": [3, 0, 5, 1], "none": [0, 0, 0, 0], "all to one": [9, 0, 0, 0], "one each": [1, 1, 1, 1]}


def squared_relu(x):
    return F.relu(x) ** 2


ACTIVATIONS = {"SwiGLU": (F.silu, True), "GeGLU": (F.gelu, True), "GELU": (F.gelu, False),
               "squared ReLU": (squared_relu, False)}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def groups():
    with harness.single_process(), harness.model_parallel():
        yield


def experts(activation, build_only=None, biases=False, xmoe=None, **options):
    """The same experts twice: Megatron's and ours, in fp64; or one of the two (0, 1) as it was initialised.

    With biases they are told that there are more ranks: Megatron's own fail in their backward otherwise.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xmoe.experts import XMoEGroupedMLP

    function, gated = ACTIVATIONS[activation]
    options |= {"expert_model_parallel_size": 2} if biases else {}
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS, ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN, add_bias_linear=biases, gated_linear_unit=gated, activation_func=function,
        gradient_accumulation_fusion=False, bias_activation_fusion=False,
        **options,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    builders = (partial(SequentialMLP, submodules=linear), partial(XMoEGroupedMLP, xmoe=xmoe))
    if build_only is not None:
        return builders[build_only](EXPERTS, config, pg_collection=groups)
    stock, ours = (build(EXPERTS, config, pg_collection=groups).double() for build in builders)
    with torch.no_grad():
        for i, expert in enumerate(stock.local_experts):
            for name, parameter in expert.named_parameters():
                if name.endswith("bias"):  # drawn, as Megatron's are zero at first
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        for name, parameter in ours.named_parameters():
            parameter.copy_(stacked(stock, name, lambda weight: weight))
    return stock, ours


def stacked(stock, name, get):
    return torch.stack([get(expert.get_parameter(name)) for expert in stock.local_experts])


ON_INPUT = {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("activation, options", [
    *((name, {}) for name in ACTIVATIONS), *((name, {"biases": True}) for name in ACTIVATIONS),
    ("SwiGLU", ON_INPUT), ("SwiGLU", ON_INPUT | {"biases": True}),
    ("SwiGLU", {"activation_func_clamp_value": 0.3, "glu_linear_offset": 1.0}),
])  # fmt: skip
def test_outputs_and_gradients(activation, options, rows, recompute):
    from megatron_xmoe.config import XMoEConfig

    stock, ours = experts(activation, xmoe=XMoEConfig("xmoe", xmoe_recompute_activation=recompute), **options)
    counts = torch.tensor(ROWS[rows])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(counts.sum(), HIDDEN, dtype=torch.float64, generator=generator)
    probs = torch.rand(counts.sum(), dtype=torch.float64, generator=generator)
    grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    results = []
    for module in (stock, ours):
        inputs = x.clone().requires_grad_(), probs.clone().requires_grad_()
        output, bias = module(inputs[0], counts, inputs[1])
        assert bias is None
        output.backward(grad)
        results.append([output, *(tensor.grad for tensor in inputs)])
    for name, parameter in ours.named_parameters():
        results[0].append(stacked(stock, name, lambda weight: weight.grad))
        results[1].append(parameter.grad)
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


def test_only_the_input_and_the_pre_activation_are_saved():
    _, ours = experts("SwiGLU")
    counts = torch.tensor(ROWS["uneven"])
    saved = []
    x = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(9, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(x, counts, probs)
    activations = sorted(t.numel() for t in saved if not isinstance(t, torch.nn.Parameter))
    assert activations == sorted([9 * HIDDEN, 9 * 2 * FFN, 9])  # rows, pre-activation, routing weights


def on_disk(module):
    """Everything a checkpoint of the module consists of: key, shapes, place and data."""
    entries = []
    for entry in module.sharded_state_dict("decoder.layers.3.mlp.experts.", ((0, 1, 5),), None).values():
        for shard in entry.build() if hasattr(entry, "build_fn") else [entry]:
            shape, place = tuple(shard.global_shape), tuple(shard.global_offset)
            entries.append((shard.key, shape, place, shard.replica_id, getattr(shard, "data", None)))
    return sorted(entries, key=lambda entry: entry[:3])


KINDS = [("SwiGLU", False), ("SwiGLU", True), ("GELU", False), ("GELU", True)]


@pytest.mark.parametrize("activation, biases", KINDS)
def test_checkpoints_are_those_of_sequential_experts(activation, biases):
    stock, ours = map(on_disk, experts(activation, biases=biases))
    assert len(stock) > (4 if biases else 2) * EXPERTS
    assert [entry[:4] for entry in ours] == [entry[:4] for entry in stock]
    for (*_, expected), (*_, actual) in zip(stock, ours, strict=True):
        if isinstance(expected, torch.Tensor):
            assert_same(actual, expected)


@pytest.mark.parametrize("activation, biases", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize("saver", [0, 1], ids=["saved by Megatron's", "saved by ours"])
def test_checkpoints_load_into_the_other_class(activation, biases, saver, tmp_path):
    """Bit for bit, by Megatron's own functions."""
    from megatron.core import dist_checkpointing

    pair = experts(activation, biases=biases)
    wanted = {name: parameter.detach().clone() for name, parameter in pair[1].named_parameters()}
    dist_checkpointing.save(pair[saver].sharded_state_dict("experts."), str(tmp_path))
    loader = pair[1 - saver]
    with torch.no_grad():
        for parameter in loader.parameters():
            parameter.fill_(7)
    state = dist_checkpointing.load(loader.sharded_state_dict("experts."), str(tmp_path))
    loader.load_state_dict({name.removeprefix("experts."): value for name, value in state.items()})
    assert len(wanted) == (4 if biases else 2)
    for name, expected in wanted.items():
        loaded = pair[1].get_parameter(name) if saver == 0 else stacked(pair[0], name, lambda weight: weight)
        assert_same(loaded.detach(), expected)


@pytest.mark.parametrize("activation, biases", KINDS)
def test_loading_puts_the_parts_together(activation, biases):
    _, ours = experts(activation, biases=biases)
    for entry in ours.sharded_state_dict("experts.", (), None).values():
        if hasattr(entry, "merge_fn"):
            assert_same(entry.merge_fn([shard.data for shard in entry.build()]), entry.data)


def test_flags_that_megatron_reads():
    _, ours = experts("SwiGLU")
    for parameter in ours.parameters():
        assert parameter.allreduce and parameter.tensor_model_parallel
    _, parallel = experts("SwiGLU", biases=True, expert_model_parallel_size=2)
    assert not any(parameter.allreduce for parameter in parallel.parameters())
    assert [name for name, parameter in parallel.named_parameters() if not hasattr(parameter, "partition_dim")] == [
        "linear_fc2.bias"  # as in Megatron's
    ]


@pytest.mark.parametrize("activation", ["SwiGLU", "GELU"])
def test_sharding_is_told_as_megatron_tells_it(activation):
    """Of what is gated a rank's rows are of both halves; and an axis of experts comes first."""
    stock, ours = experts(activation)
    expected = dict(stock.local_experts[0].named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.partition_stride == expected[name].partition_stride
        assert parameter.partition_dim == 1 + expected[name].partition_dim


@pytest.mark.parametrize("asked, of_megatron, expected", [
    ("auto", True, True), ("auto", False, False), ("on", False, True), ("off", True, False),
])  # fmt: skip
def test_who_decides_about_main_grad(asked, of_megatron, expected, monkeypatch):
    from megatron_xmoe.config import XMoEConfig

    ours = experts("SwiGLU", build_only=1, xmoe=XMoEConfig("xmoe", xmoe_gradient_accumulation_fusion=asked))
    monkeypatch.setattr(ours.config, "gradient_accumulation_fusion", of_megatron)
    rebuilt = type(ours)(EXPERTS, ours.config, pg_collection=groups_of_megatron(), xmoe=ours.xmoe)
    assert rebuilt.into_main_grad == expected


def groups_of_megatron():
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def test_parameters_are_asked_for_by_a_call():
    """Megatron waits in a hook of the module that has them when it still gathers parameters."""
    _, ours = experts("SwiGLU")
    asked = []
    for name in ("linear_fc1", "linear_fc2"):
        ours.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: asked.append(name))
    ours(torch.randn(9, HIDDEN, dtype=torch.float64), torch.tensor(ROWS["uneven"]), torch.rand(9).double())
    assert asked == ["linear_fc1", "linear_fc2"]


def test_a_seed_means_the_same_weights():
    """Losses of both backends are comparable from the first iteration on."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    drawn = []
    for index in (0, 1):
        model_parallel_cuda_manual_seed(7, force_reset_rng=True)
        drawn.append(experts("SwiGLU", build_only=index))
    for name, parameter in drawn[1].named_parameters():
        assert_same(parameter.detach(), stacked(drawn[0], name, lambda weight: weight.detach()))


def test_experts_that_cannot_be_shared_are_refused():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xmoe.experts import XMoEGroupedMLP

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=2, moe_ffn_hidden_size=10,
        add_bias_linear=False,
    )  # fmt: skip
    groups = SimpleNamespace(expt_tp=SimpleNamespace(size=lambda: 4))
    with pytest.raises(ValueError, match="--moe-ffn-hidden-size 10 .* --expert-tensor-parallel-size 4"):
        XMoEGroupedMLP(2, config, pg_collection=groups)
