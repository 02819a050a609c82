"""The modules that stand in for Megatron's, the specs they get into, and the patches: against Megatron's own."""

import importlib.metadata
import re
import sys
import types
from dataclasses import fields, is_dataclass
from functools import partial

import harness
import oracles
import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from tolerances import assert_close, assert_same

from megatron_xmoe.attention import SDPACoreAttention
from megatron_xmoe.backend import apply_moe_backend, verify_no_stock_layer
from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.experts import XMoEGroupedMLP
from megatron_xmoe.layer import XMoELayer
from megatron_xmoe.norm import TorchNorm
from megatron_xmoe.platform import cpu, wheel
from megatron_xmoe.platform.patching import Replacement, apply
from megatron_xmoe.specs import substitute, substituting, substitutions, xmoe_decoder_block_spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
XMOE = XMoEConfig(moe_backend="xmoe")


@pytest.fixture(scope="module", autouse=True)
def groups():
    """Megatron's process groups for one process."""
    with harness.single_process(), harness.model_parallel():
        yield


def config(**changes) -> TransformerConfig:
    """A small model's configuration that needs neither Transformer Engine nor Apex."""
    options = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
    }
    return TransformerConfig(**options | changes)


def moe_config(**changes) -> TransformerConfig:
    """The same with a dense layer, then one with experts and a shared expert."""
    options = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_layer_freq": [0, 1],
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 16,
        "moe_token_dispatcher_type": "alltoall",
        "qk_layernorm": True,
        "normalization": "RMSNorm",
    }
    return config(**options | changes)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal fp32 values, the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norm_is_torchs(name):
    ours = TorchNorm(config(normalization=name), hidden_size=24, eps=0.5)
    torchs = getattr(torch.nn, name)(24, eps=0.5)
    stock = WrappedTorchNorm(config(normalization=name), hidden_size=24, eps=0.5)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    x = random(3, 24).cpu()
    assert_same(ours(x), torchs(x))


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norm_weights_carry_the_sequence_parallel_mark(name, marked):
    norm = TorchNorm(config(normalization=name, sequence_parallel=marked, tensor_model_parallel_size=2), hidden_size=8)
    marks = [parameter.sequence_parallel for parameter in norm.parameters()]
    assert marks == [marked] * (2 if name == "LayerNorm" else 1)


def test_norm_refuses_what_torch_has_not():
    with pytest.raises(ValueError, match="--apply-layernorm-1p .*leave the option out"):
        TorchNorm(config(layernorm_zero_centered_gamma=True), hidden_size=8)
    with pytest.raises(ValueError, match="--normalization L2Norm .*LayerNorm, RMSNorm"):
        TorchNorm(config(normalization="L2Norm"), hidden_size=8)


S, B, N, D = 9, 2, 4, 8  # queries, micro-batch, heads, head size


def some_mask(queries: int = S, keys: int = S) -> torch.Tensor:
    """[B, 1, S, C] bool, True where hidden, another for each sample; every query sees something."""
    mask = random(B, 1, queries, keys, seed=7) > 0
    return mask & ~torch.eye(queries, keys, dtype=torch.bool, device=DEVICE)


# name -> (changes of the configuration, arguments of the module, the mask)
ATTENTION = {
    "causal": ({}, {}, None),
    "no mask": ({}, {"attn_mask_type": AttnMaskType.no_mask}, None),
    "mask": ({}, {"attn_mask_type": AttnMaskType.padding}, some_mask),
    "mask in a causal module": ({}, {}, some_mask),
    "one mask for the whole batch": ({}, {}, lambda: some_mask()[:1]),
    "grouped queries": ({"num_query_groups": 2}, {}, None),
    "one group, mask": ({"num_query_groups": 1}, {}, some_mask),
    "window": ({"window_size": (2, 0)}, {}, None),
    "window to both sides": ({"window_size": (3, 1)}, {}, None),
    "window in this layer": ({"window_size": (2, 0), "window_attn_skip_freq": 2}, {"layer_number": 1}, None),
    "no window in this layer": ({"window_size": (2, 0), "window_attn_skip_freq": 2}, {"layer_number": 2}, None),
    "layer scaling": ({"apply_query_key_layer_scaling": True}, {"layer_number": 3}, None),
    "scale": ({}, {"softmax_scale": 0.7}, None),
    "scale, layer scaling": ({"apply_query_key_layer_scaling": True}, {"layer_number": 3, "softmax_scale": 0.7}, None),
    "head size": ({"kv_channels": 20}, {}, None),
}


def attend(module: torch.nn.Module, inputs, mask, grad) -> list[torch.Tensor]:
    """The module's result and the gradients of query, key and value."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = module(*leaves, mask)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad)]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_megatrons(name):
    changes, arguments, make_mask = ATTENTION[name]
    cfg = config(**changes)
    arguments = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self", **arguments}
    groups, size = cfg.num_query_groups, cfg.kv_channels
    inputs = [random(S, B, heads, size, seed=i) for i, heads in enumerate((N, groups, groups))]
    mask = make_mask() if make_mask else None
    grad = random(S, B, N * size, seed=5)
    expected = attend(DotProductAttention(cfg, **arguments), inputs, mask, grad)
    for found, wanted in zip(attend(SDPACoreAttention(cfg, **arguments), inputs, mask, grad), expected, strict=True):
        assert_close(found, wanted)


def core_attention(**arguments) -> SDPACoreAttention:
    """Our module for a causal layer without options, unless told otherwise."""
    cfg = arguments.pop("config", None) or config()
    arguments = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self", **arguments}
    return SDPACoreAttention(cfg, **arguments)


def assert_attends(module, inputs, hidden, scale, **forward_arguments):
    """Compare with plain softmax over what `hidden` [S, C] leaves, in float64, forward and gradients."""
    grad = random(*inputs[0].shape[:2], inputs[0].shape[2] * inputs[2].shape[3], seed=5)
    found = attend(partial(module, **forward_arguments), inputs, None, grad)
    result, grads = oracles.gradients(
        lambda q, k, v: oracles.attention(q, k, v, hidden, scale), [x.cpu() for x in inputs], grad.cpu()
    )
    for actual, expected in zip(found, [result, *grads], strict=True):
        assert_close(actual.cpu(), expected)


def causally_hidden(queries: int, keys: int) -> torch.Tensor:
    """[S, C] True for keys after the query, where the queries are the last tokens of the context."""
    return torch.tensor([[c > keys - queries + s for c in range(keys)] for s in range(queries)])


def test_attention_with_value_heads_of_another_size():
    inputs = [random(S, B, N, 12, seed=1), random(S, B, N, 12, seed=2), random(S, B, N, 6, seed=3)]
    module = core_attention(k_channels=12, v_channels=6)
    assert_attends(module, inputs, causally_hidden(S, S), 12**-0.5)
    module = core_attention(k_channels=12, v_channels=6, softmax_scale=0.4)
    assert_attends(module, inputs, causally_hidden(S, S), 0.4)


@pytest.mark.parametrize("queries", [1, 3])
def test_queries_are_the_last_of_a_longer_context(queries):
    inputs = [random(queries, B, N, D, seed=1), random(7, B, 2, D, seed=2), random(7, B, 2, D, seed=3)]
    assert_attends(core_attention(), inputs, causally_hidden(queries, 7), D**-0.5)


def test_window_of_the_last_queries_of_a_longer_context():
    inputs = [random(3, B, N, D, seed=i) if i == 0 else random(7, B, N, D, seed=i) for i in range(3)]
    hidden = torch.tensor([[not 4 + s - 2 <= c <= 4 + s for c in range(7)] for s in range(3)])
    assert_attends(core_attention(config=config(window_size=(2, 0))), inputs, hidden, D**-0.5)


def test_mask_type_of_a_call_counts():
    inputs = [random(S, B, N, D, seed=i) for i in range(3)]
    nothing = torch.zeros(S, S, dtype=torch.bool)
    assert_attends(core_attention(), inputs, nothing, D**-0.5, attn_mask_type=AttnMaskType.no_mask)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_attention_dropout(sequence_parallel):
    """Only in training; ranks that hold other heads of the same tokens draw from generators of their own."""
    cfg = config(attention_dropout=0.5, sequence_parallel=sequence_parallel, tensor_model_parallel_size=2)
    module = core_attention(config=cfg)
    inputs = [random(S, B, N, D, seed=i) for i in range(3)]
    without = core_attention()(*inputs, None)
    assert_same(module.eval()(*inputs, None), without)

    module.train()
    state = torch.cuda.get_rng_state()
    dropped = module(*inputs, None)
    assert not torch.equal(dropped, without)
    assert torch.equal(torch.cuda.get_rng_state(), state) is not sequence_parallel
    assert not torch.equal(module(*inputs, None), dropped)


def test_attention_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="--context-parallel-size 2 "):
        core_attention(config=config(context_parallel_size=2))
    with pytest.raises(ValueError, match="--softmax-type learnable "):
        core_attention(config=config(softmax_type="learnable"))
    inputs = [random(S, B, N, D)] * 3
    with pytest.raises(ValueError, match="packed sequences"):
        core_attention()(*inputs, None, packed_seq_params=object())
    with pytest.raises(ValueError, match="attention bias"):
        core_attention()(*inputs, None, attention_bias=torch.zeros(1))


def modules_in(spec, path: str = "") -> dict[str, object]:
    """Every leaf of a spec (class, function, value) under its path, found independently of specs.py."""
    if isinstance(spec, partial):
        inner = {f"{path}({name})": value for name, value in spec.keywords.items()}
        return {f"{path}!": spec.func} | modules_in_all(inner)
    if isinstance(spec, list | tuple):
        return modules_in_all({f"{path}[{i}]": item for i, item in enumerate(spec)})
    if isinstance(spec, dict):
        return modules_in_all({f"{path}[{name}]": item for name, item in spec.items()})
    if is_dataclass(spec) and not isinstance(spec, type):
        return modules_in_all({f"{path}.{f.name}": getattr(spec, f.name) for f in fields(spec)})
    return {path: spec}


def modules_in_all(specs: dict[str, object]) -> dict[str, object]:
    """The leaves of several specs."""
    return {path: leaf for name, spec in specs.items() for path, leaf in modules_in(spec, name).items()}


def local_block_spec(cfg: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's own spec without Transformer Engine."""
    return get_gpt_decoder_block_spec(cfg, use_transformer_engine=False, normalization=cfg.normalization)


def test_substitute_replaces_everywhere_and_leaves_the_original():
    cfg = moe_config()
    stock = local_block_spec(cfg)
    before = modules_in(stock)
    # input, q, k and pre-MLP norms of two layers, and the final one
    assert list(before.values()).count(WrappedTorchNorm) == 2 * 4 + 1
    assert list(before.values()).count(DotProductAttention) == 2
    assert list(before.values()).count(MoELayer) == list(before.values()).count(SequentialMLP) == 1

    ours = modules_in(substitute(stock, substitutions(cfg, XMOE)))
    assert modules_in(stock) == before
    table = {WrappedTorchNorm: TorchNorm, DotProductAttention: SDPACoreAttention, MoELayer: XMoELayer,
             SequentialMLP: XMoEGroupedMLP}  # fmt: skip
    for path, module in before.items():
        replaced = isinstance(module, type) and module in table
        assert ours[path] is table[module] if replaced else ours[path] == module, path
    added = {path.rpartition("(xmoe).")[2] for path in ours.keys() - before.keys()}
    assert added == {field.name for field in fields(XMoEConfig)}  # given to the layer and to its experts


@pytest.mark.parametrize(
    "changes",
    [
        {"softmax_type": "learnable"},
        {"softmax_type": "off-by-one"},
        {"attention_backend": AttnBackend.unfused},
        {"attention_backend": AttnBackend.local},
    ],
    ids=str,
)
def test_attention_stays_megatrons_where_ours_cannot_or_should_not_serve(changes):
    cfg = moe_config(**changes)
    modules = list(modules_in(substitute(local_block_spec(cfg), substitutions(cfg, XMOE))).values())
    assert modules.count(DotProductAttention) == 2
    assert SDPACoreAttention not in modules
    assert XMoELayer in modules


def test_backend_megatron_keeps_its_layer():
    cfg = moe_config()
    modules = list(modules_in(substitute(local_block_spec(cfg), substitutions(cfg, XMoEConfig()))).values())
    assert MoELayer in modules and XMoELayer not in modules
    assert SequentialMLP in modules and XMoEGroupedMLP not in modules
    assert WrappedTorchNorm not in modules and DotProductAttention not in modules


def test_substitute_in_the_spec_of_a_dense_layer():
    stock = get_gpt_layer_local_spec(qk_layernorm=True)
    ours = substitute(stock, substitutions(config(), XMOE))
    assert isinstance(ours, ModuleSpec) and ours.module is stock.module
    modules = list(modules_in(ours).values())
    assert modules.count(TorchNorm) == 4 and modules.count(SDPACoreAttention) == 1
    assert WrappedTorchNorm not in modules and DotProductAttention not in modules


def test_spec_of_a_single_layer_gets_our_final_norm_too():
    """Megatron builds a block of as many layers from it, with a final norm that is in no spec."""
    model_config = types.SimpleNamespace(transformer=config())
    spec = substituting(lambda config, vp_stage: get_gpt_layer_local_spec(), XMoEConfig())(model_config)
    assert len(spec.layer_specs) == 2
    block = TransformerBlock(model_config.transformer, spec)
    norms = [module for module in block.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 2 + 1
    assert all(hasattr(norm.weight, "sequence_parallel") for norm in norms)


def test_spec_for_megatrons_spec_option():
    modules = list(modules_in(xmoe_decoder_block_spec(moe_config())).values())
    assert XMoELayer in modules and MoELayer not in modules
    assert xmoe_decoder_block_spec(types.SimpleNamespace(transformer=moe_config())).layer_norm is TorchNorm


def with_stacked_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights or gradients of a block, with those of all experts in one tensor, as grouped experts hold them."""
    result = {name: value for name, value in tensors.items() if "local_experts" not in name}
    for name in tensors:
        if "local_experts.0" in name and name.endswith("weight"):
            experts = [tensors[name.replace("experts.0", f"experts.{i}")] for i in range(4)]
            result[name.replace("local_experts.0.", "")] = torch.stack(experts)
    return result


def test_block_of_substituted_modules_computes_what_megatrons_does():
    cfg = moe_config()
    stock = TransformerBlock(cfg, local_block_spec(cfg)).to(DEVICE)
    ours = TransformerBlock(cfg, substitute(local_block_spec(cfg), substitutions(cfg, XMOE))).to(DEVICE)
    ours.load_state_dict(with_stacked_experts(stock.state_dict()))
    results = []
    for block in (stock, ours):
        x = random(S, B, 32).requires_grad_()
        result = block(x, attention_mask=None)
        result.backward(random(S, B, 32, seed=5))
        grads = with_stacked_experts({name: parameter.grad for name, parameter in block.named_parameters()})
        results.append({"output": result.detach(), "x": x.grad, **grads})
    expected, found = results
    assert expected.keys() == found.keys()
    for name in expected:
        assert_close(found[name], expected[name])


def moe_layer(kind: type[MoELayer]) -> MoELayer:
    """An MoE layer of the given class."""
    cfg = moe_config()
    return kind(cfg, submodules=get_moe_module_spec(use_te=False, num_experts=4).keywords["submodules"])


def test_a_stock_layer_left_in_the_model_is_named():
    layers = torch.nn.ModuleList([moe_layer(XMoELayer), moe_layer(MoELayer), torch.nn.Linear(2, 2)])
    chunks = [torch.nn.ModuleDict({"decoder": torch.nn.ModuleDict({"layers": layers})})]
    with pytest.raises(RuntimeError, match=r"1 layer.*: decoder\.layers\.1\. "):
        verify_no_stock_layer(chunks)
    del layers[1]
    assert verify_no_stock_layer(chunks) is chunks


def model_config(cfg: TransformerConfig) -> types.SimpleNamespace:
    """What apply_moe_backend touches of Megatron's GPTModelConfig."""
    return types.SimpleNamespace(transformer=cfg, transformer_layer_spec=None, post_wrap_hooks=[])


@pytest.mark.parametrize(("name", "layer", "hooks"), [("xmoe", XMoELayer, 1), ("megatron", MoELayer, 0)])
def test_backend_sets_spec_and_check(name, layer, hooks):
    model = model_config(moe_config())
    apply_moe_backend(
        model, XMoEConfig(moe_backend=name), lambda config, vp_stage: local_block_spec(config.transformer)
    )
    modules = list(modules_in(model.transformer_layer_spec(model, vp_stage=None)).values())
    assert {MoELayer, XMoELayer}.intersection(m for m in modules if isinstance(m, type)) == {layer}
    assert model.post_wrap_hooks == [verify_no_stock_layer] * hooks


def test_backend_refuses_a_model_without_experts():
    with pytest.raises(ValueError, match="--num-experts"):
        apply_moe_backend(model_config(config()), XMOE, lambda config, vp_stage: None)


@pytest.fixture
def package(monkeypatch):
    """A module with something to replace."""

    class Thing:
        def method(self):
            return "stock"

    module = types.ModuleType("package_of_a_test")
    module.Thing, module.function, module.__version__ = Thing, lambda: "stock", "1.2.3"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_patches_are_applied_once(package):
    def make(original):
        return lambda *args: f"not {original(*args)}"

    patches = [Replacement(f"package_of_a_test:{path}", make, "a test") for path in ("function", "Thing.method")]
    assert apply(patches) == 2
    assert apply(patches) == 0
    assert package.function() == package.Thing().method() == "not stock"


@pytest.mark.parametrize("target", ["package_of_a_test:gone", "package_of_a_test:Thing.gone", "package_of_a_test:No.m"])
def test_a_symbol_that_moved_is_named(package, target):
    with pytest.raises(RuntimeError, match=f"{target} does not exist in package_of_a_test 1.2.3 .* because of a test"):
        apply([Replacement(target, lambda original: original, "of a test")])


def test_a_symbol_of_megatron_that_moved_is_named_with_its_version():
    version = importlib.metadata.version("megatron-core")
    for target in ("megatron.core.utils:gone", "megatron.core.gone:name"):
        with pytest.raises(RuntimeError, match=re.escape(f"{target} does not exist in megatron-core {version} (")):
            apply([Replacement(target, lambda original: original, "of a test")])


def test_cpu_platform_is_refused_where_there_is_an_accelerator(monkeypatch):
    applied = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "apply", applied.append)
    with pytest.raises(RuntimeError, match="accelerator"):
        cpu.install()
    assert not applied


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the stand-ins are for machines without a GPU")
def test_installing_the_platform_again_changes_nothing():
    def current():
        return torch.empty, torch.cuda.current_device, torch.Tensor.to, torch.nn.Module.cuda, torch.cuda.Stream

    before = current()
    assert {r.target for r in cpu.install()} >= {"torch:empty", "torch.cuda:current_device", "torch:Tensor.to"}
    wheel.install()
    assert all(a is b for a, b in zip(current(), before, strict=True))
