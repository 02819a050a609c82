"""X-MoE as a Mixture-of-Experts backend of Megatron-Core. Importing this package changes nothing."""

from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.version import __version__

__all__ = ["XMoEConfig", "__version__"]
