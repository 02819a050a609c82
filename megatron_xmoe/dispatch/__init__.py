"""Token dispatchers: the communication between a router and the experts."""

from megatron_xmoe.dispatch.all_to_all import AllToAllDispatcher

__all__ = ["AllToAllDispatcher"]
