"""Caching strategies on ComfyUI's MODEL."""

from .seams import WHY_NOTHING_WORKS
from .wrappers import strategies_of, with_cache

__all__ = ["WHY_NOTHING_WORKS", "strategies_of", "with_cache"]
