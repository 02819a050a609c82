"""What the Triton kernels' launchers share. Imported only where Triton is installed.

The same kernels run on NVIDIA and AMD GPUs, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1).
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

ACCESS_BYTES = 16  # the widest load or store of one thread


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def vector_length(hidden: int, itemsize: int) -> int:
    """Elements that one access can hold so that every row of `hidden` elements starts at a multiple of it."""
    return min(ACCESS_BYTES // itemsize, hidden & -hidden) if hidden else 1


@cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp (AMD: wavefront); that of an NVIDIA GPU for the interpreter, which has none."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def on(x: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one for a launch."""
    here = x.device.type != "cuda" or x.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(x.device)
