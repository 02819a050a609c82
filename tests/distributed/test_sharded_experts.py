"""Experts on several ranks, or shared by tensor-parallel ranks: on disk they are what Megatron's SequentialMLP saves.

Those that are not shared have biases.
"""

import harness
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_same

EXPERTS, HIDDEN, FFN = 4, 12, 6


def saved(gated: bool) -> list[list[tuple]]:
    """What both kinds of experts save on this rank, from the same weights: key, shape, place, replica and data."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xmoe.experts import XMoEGroupedMLP

    groups = ProcessGroupCollection.use_mpu_process_groups()
    ep, etp = groups.ep.size(), groups.expt_tp.size()
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS, ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN, add_bias_linear=etp == 1, gated_linear_unit=gated, activation_func=F.silu,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, tensor_model_parallel_size=etp,
        expert_tensor_parallel_size=etp, expert_model_parallel_size=ep, sequence_parallel=etp > 1,
    )  # fmt: skip
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    stock = SequentialMLP(EXPERTS // ep, config, linear, pg_collection=groups)
    ours = XMoEGroupedMLP(EXPERTS // ep, config, pg_collection=groups)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            of_experts = [expert.get_parameter(name) for expert in stock.local_experts]
            for expert in of_experts if name.endswith("bias") else ():
                expert.normal_()  # they start as zeros
            parameter.copy_(torch.stack(of_experts))
    return [entries(module) for module in (stock, ours)]


def entries(module) -> list[tuple]:
    """Everything of a module's checkpoint on this rank."""
    found = []
    for entry in module.sharded_state_dict("decoder.layers.3.mlp.experts.", ((0, 1, 5),), None).values():
        for shard in entry.build() if hasattr(entry, "build_fn") else [entry]:
            data = getattr(shard, "data", None)
            found.append((shard.key, tuple(shard.global_shape), tuple(shard.global_offset), shard.replica_id, data))
    return sorted(found, key=lambda item: item[:3])


def run(layouts: list[tuple[int, int]]) -> dict:
    """Results by (expert-tensor, expert) parallel size and activation."""
    results = {}
    for etp, ep in layouts:
        with harness.model_parallel(tp=etp, ep=ep, etp=etp):
            results |= {(etp, ep, gated): saved(gated) for gated in (True, False)}
    return results


LAYOUTS = [(2, 1), (2, 2), (1, 2), (1, 4)]


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return harness.run_distributed(run, 4, LAYOUTS)


@pytest.mark.parametrize("gated", [True, False], ids=["SwiGLU", "SiLU"])
@pytest.mark.parametrize("etp, ep", LAYOUTS)
def test_checkpoints_are_those_of_sequential_experts(results, etp, ep, gated):
    places = set()
    for rank in results:
        stock, ours = rank[etp, ep, gated]
        assert [entry[:4] for entry in ours] == [entry[:4] for entry in stock]
        for (*_, expected), (*_, actual) in zip(stock, ours, strict=True):
            if isinstance(expected, torch.Tensor):
                assert_same(actual, expected)
        places |= {entry[:3] for entry in ours if isinstance(entry[4], torch.Tensor)}
    biases = (3 if gated else 2) if etp == 1 else 0
    assert len(places) == EXPERTS * (etp * (3 if gated else 2) + biases)  # every shard of everything is on some rank
