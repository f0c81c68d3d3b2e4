"""The nodes: forms around `with_cache`, what it did and what it changed, and the demo."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..cache_core.strategies import all_strategies
from . import replacements
from .cache_node import cache_node
from .compare_node import CompareSettings
from .demo_node import LoadDemo
from .preset_node import CachePreset
from .report_node import CacheReport
from .routes import add_routes
from .settings_node import ApplySettings


class RefrainExtension(ComfyExtension):
    """All nodes of this pack."""

    async def on_load(self) -> None:
        """Offer our nodes where a workflow has some of packs that no longer work."""
        await replacements.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """A node for each strategy, those around them, the report and the demo. Called once, before questions come."""
        add_routes()
        caches = map(cache_node, all_strategies())
        return [*caches, CachePreset, ApplySettings, CompareSettings, CacheReport, LoadDemo]
