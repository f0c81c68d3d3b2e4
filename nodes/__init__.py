"""The nodes: forms around `with_cache`, what it did and what it changed, and the demos."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from comfy_api.latest import ComfyExtension, io

from ..cache_core.strategies import all_strategies
from . import replacements
from .cache_node import cache_node
from .preset_node import CachePreset
from .report_node import CacheReport
from .routes import add_routes
from .settings_node import ApplySettings

logger = logging.getLogger(__name__)


class RefrainExtension(ComfyExtension):
    """All nodes of this pack."""

    async def on_load(self) -> None:
        """Offer our nodes where a workflow has some of packs that no longer work."""
        with _if_possible("offering them for old nodes of other packs"):
            await replacements.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """A node for each strategy, those around them, the report and the demos. Called once, before questions come."""
        nodes = [*map(cache_node, all_strategies()), CachePreset, ApplySettings, CacheReport]
        with _if_possible("comparing caches"):
            from .compare_node import CompareSettings

            nodes.append(CompareSettings)
        with _if_possible("finding cache settings"):
            from .find_node import FindSettings

            nodes.append(FindSettings)
        with _if_possible("loading the demos"):
            from .demo_node import LoadDemo, LoadVideoDemo

            nodes += [LoadDemo, LoadVideoDemo]
        with _if_possible("answering for the last runs"):
            add_routes()
        return nodes


@contextmanager
def _if_possible(what: str) -> Iterator[None]:
    """Around what the nodes can do without: ComfyUI may have no server, or another's in its place."""
    try:
        yield
    except Exception as error:
        logger.warning("Refrain's nodes are loaded, but %s is not possible in this ComfyUI: %r", what, error)
