"""The compiled index arithmetic of redundancy bypassing, on the CPU and GPUs: functions of `kernels.reference_bypass`.

They call `megatron_xmoe._C` itself, without operators of torch around it: what they are for waits for the host in every
pass, which cannot be compiled anyway, and their time on the host delays the exchange between nodes.
"""

import torch
from torch import Tensor

from megatron_xmoe.kernels import reference_bypass

MOST_PER_TOKEN = 512  # routes that a block of a GPU compares with each other: kMostPerToken of csrc/bypass.h


def number_copies(inverse: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.reference_bypass.number_copies`, which does it for tokens of more than MOST_PER_TOKEN routes."""
    if inverse.shape[1] > MOST_PER_TOKEN:
        return reference_bypass.number_copies(inverse, *args)
    return _call("number_copies", inverse, *args)


def sources_of_rows(bins: Tensor, *args) -> Tensor:
    """See `kernels.reference_bypass.sources_of_rows`."""
    return _call("sources_of_rows", bins, *args)


def write_meta(meta: Tensor, *args) -> None:
    """See `kernels.reference_bypass.write_meta`."""
    _call("write_meta", meta, *args)


def read_lists(meta: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.reference_bypass.read_lists`."""
    return _call("read_lists", meta, *args)


def read_routes(meta: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.reference_bypass.read_routes`."""
    return _call("read_routes", meta, *args)


def routes_of_rows(copy: Tensor, *args) -> Tensor:
    """See `kernels.reference_bypass.routes_of_rows`."""
    return _call("routes_of_rows", copy, *args)


def parts_of_sums(segment: Tensor, *args) -> Tensor:
    """See `kernels.reference_bypass.parts_of_sums`."""
    return _call("parts_of_sums", segment, *args)


def write_weights(rows: Tensor, *args) -> None:
    """See `kernels.reference_bypass.write_weights`."""
    _call("write_weights", rows, *args)


def read_weights(rows: Tensor, *args) -> Tensor:
    """See `kernels.reference_bypass.read_weights`."""
    return _call("read_weights", rows, *args)


def _call(name: str, first: Tensor, *args):
    """A function of `_C` on the current stream of the device that `first` is on."""
    from megatron_xmoe import _C

    stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda else 0
    return getattr(_C, name)(first, *args, stream)
