"""X-MoE's Mixture-of-Experts layer."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_xmoe.config import XMoEConfig
from megatron_xmoe.dispatch import AllToAllDispatcher
from megatron_xmoe.metrics import count_routes


class XMoELayer(MoELayer):
    """Megatron's MoELayer with a padding-free dispatcher.

    Router, shared experts, losses and the stages of the forward pass are Megatron's own, and the experts are whatever
    the spec says. Distributed checkpoints have the same keys and shapes, so they move between the two.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        xmoe: XMoEConfig | None = None,
    ):
        """Args are those of MoELayer, and `xmoe`, the options of X-MoE (defaults if None).

        Raises:
            ValueError: expert tensor parallelism.
        """
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            name=name,
        )
        self.xmoe = xmoe or XMoEConfig(moe_backend="xmoe")
        # MoELayer builds one of its own dispatchers and has no seam for another
        self.token_dispatcher = AllToAllDispatcher(self.num_local_experts, config, pg_collection)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Megatron's routing; also counts each expert's routes where that was asked for.

        Args: hidden_states [S, B, H]; padding_mask [S, B] bool. Returns probs [T, E] and routing_map [T, E] bool.
        """
        probs, routing_map = super().route(hidden_states, padding_mask)
        count_routes(self.layer_number, routing_map)
        return probs, routing_map
