"""Collectives in which ranks give different numbers of rows: NCCL has them, gloo only as an exchange."""

import functools

import torch


def gather_uneven(original):
    """Megatron's gathering of rows, for the case that ranks give different numbers of rows: exchanged in turn."""

    @functools.wraps(original)
    def gather(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or len(set(output_split_sizes)) == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        rows = input_.repeat(group.size(), *[1] * (input_.dim() - 1))
        sent = [len(input_)] * group.size()
        torch.distributed.all_to_all_single(output, rows, output_split_sizes, sent, group=group)
        return output

    return gather


def reduce_scatter_uneven(original):
    """Megatron's summing and scattering of rows, likewise; summed in the order of the ranks."""

    @functools.wraps(original)
    def reduce_scatter(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or len(set(input_split_sizes)) == 1:
            return original(input_, group, input_split_sizes, use_global_buffer)
        mine, size = input_split_sizes[group.rank()], group.size()
        parts = input_.new_empty(size * mine, *input_.shape[1:])
        torch.distributed.all_to_all_single(
            parts, input_.contiguous(), [mine] * size, input_split_sizes, group=group
        )
        return parts.view(size, mine, *input_.shape[1:]).sum(dim=0)

    return reduce_scatter
