"""Token dispatchers: the communication between a router and the experts."""

from megatron_xmoe.dispatch.all_to_all import AllToAllDispatcher
from megatron_xmoe.dispatch.redundancy_bypass import RedundancyBypassDispatcher

__all__ = ["AllToAllDispatcher", "RedundancyBypassDispatcher"]
