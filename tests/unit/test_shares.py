"""What decides about a block's sequence, and which rows are whose."""

from dataclasses import dataclass

import pytest
import torch

from megatron_xmoe.sequence_shard import block_mode, gradients_summed, scale_gradient, share_of


@dataclass
class Group:
    """A process group as far as a place in it."""

    ranks: int
    place: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.place


@pytest.mark.parametrize("option", ["auto", "on", "off"])
@pytest.mark.parametrize("shards", [1, 2])
def test_mode(option, shards):
    assert block_mode(option, 1, False, shards) == ("given", "no tensor parallelism: nothing to shard")
    mode, why = block_mode(option, 4, True, shards)
    assert mode == "given" and why == "sharded over 4 ranks already by --sequence-parallel: nothing to add"
    mode, why = block_mode(option, 4, False, shards)
    sharded = option == "on" or (option == "auto" and shards == 1)
    assert mode == ("sharded" if sharded else "duplicated")
    assert ("takes its share" in why) == sharded and option in why


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_are_the_sequence_in_the_order_of_the_ranks(length, size):
    rows = list(range(length))
    shares = [rows[share_of(length, Group(size, rank))] for rank in range(size)]
    assert sum(shares, []) == rows
    assert len({len(share) for share in shares}) == 1 or length % size


def test_scaled_gradient():
    x = torch.ones(3, requires_grad=True)
    result = scale_gradient(x, 4)
    result.sum().backward()
    assert result.tolist() == [1, 1, 1] and x.grad.tolist() == [4, 4, 4]


def test_parameters_are_put_back():
    """Whatever happens within, the module has its own parameters afterwards."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
    before = dict(module.named_parameters())
    with pytest.raises(RuntimeError), gradients_summed(module, Group(1, 0)):
        assert not any(isinstance(p, torch.nn.Parameter) for p in (module[0].weight, module[0].bias, module[1].weight))
        raise RuntimeError
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
