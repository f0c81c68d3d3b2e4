"""The nodes: forms around `with_cache`, the report of what it did, and the demo."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..cache_core.strategies import all_strategies
from .cache_node import cache_node
from .demo_node import LoadDemo
from .report_node import CacheReport


class RefrainExtension(ComfyExtension):
    """All nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """One node for each strategy, the report and the demo."""
        return [*map(cache_node, all_strategies()), CacheReport, LoadDemo]
