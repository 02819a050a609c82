"""Which ranks hold the replicas of an expert: --xmoe-ep-placement, which Megatron's arguments cannot express.

`initialize_model_parallel` takes the order in which ranks are numbered along the parallel dimensions, and derives all
groups from it, dense and expert; its training loop passes one of two fixed orders.
"""

import functools

from megatron_xmoe.platform.patching import Replacement, apply


def dp_first(order: str = "tp-cp-ep-dp-pp") -> str:
    """An order of Megatron's with 'dp' where 'ep' was and the other way round.

    Orders name the dimension in which neighbouring ranks differ first. Dense layers have no 'ep', so as long as only
    pipeline stages of size 1 lie between the two, their groups stay what they were.
    """
    swapped = {"ep": "dp", "dp": "ep"}
    return "-".join(swapped.get(dimension, dimension) for dimension in order.split("-"))


def install_dp_first() -> list[Replacement]:
    """Make Megatron put the replicas of an expert on neighbouring ranks. Call before it builds its process groups.

    Raises:
        RuntimeError: the installed version has no initialize_model_parallel.
    """
    apply(REPLACEMENTS)
    return list(REPLACEMENTS)


def _with_replicas_first(original):
    @functools.wraps(original)
    def initialize_model_parallel(*args, **kwargs):
        order = kwargs.pop("order", None)
        return original(*args, **kwargs, order=dp_first(order) if order else dp_first())

    return initialize_model_parallel


REPLACEMENTS = [
    Replacement(
        "megatron.core.parallel_state:initialize_model_parallel",
        _with_replicas_first,
        "no argument of Megatron's puts the replicas of an expert on neighbouring ranks (--xmoe-ep-placement dp-first)",
    ),
]
