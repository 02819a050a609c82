"""Index arithmetic of redundancy bypassing (paper, section 4.2), without waiting for the host.

The operations are functions of the backend in use and have no gradients; `kernels.reference_bypass` says what they do,
and what bins are. `dispatch.bypass_plan` makes the tables.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_xmoe.kernels.reference_bypass import FAR, NODE_BIT
from megatron_xmoe.kernels.registry import kernel

__all__ = ["FAR", "NODE_BIT", "NO_NODE", "Numbered", "operation"]

NO_NODE = 2**16 - 1  # of a route that does not exist: sorts after every node


@dataclass(frozen=True)
class Numbered:
    """Copies of a rank's tokens: T tokens, K routes per token, N = T * K, L experts of a rank, R ranks of the largest
    node, G ranks. [T, K] tables have a token's routes in the order of their keys."""

    bins: Tensor
    """[T, K] int64: the bin of a copy; -1 where another route stands for it."""

    number: Tensor
    """[T, K] int32: the copy's number in its bin; of those that stay the token; -1 in a bin -1."""

    pilot_number: Tensor
    """[T, K] int32: the number of the first copy on the same node, -1 where there is none."""

    words: Tensor
    """[N] int32 in expert order: (number * R + place) * slots + slot of each route's copy, see `read_words`; anything
    after the last kept route."""

    told: Tensor
    """[2, G, 2R + L] int64: first what each rank is told: copies in its bins, [R]; in the bins that say what others
    send or forward to it, [R]; routes of its experts, [L]. Then room for what each tells this one."""


def operation(name: str, like: Tensor) -> Callable:
    """A function of `kernels.reference_bypass` in the backend in use for a tensor's device."""
    return kernel(name, like.device.type)
