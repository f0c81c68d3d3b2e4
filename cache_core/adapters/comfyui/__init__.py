"""Caching strategies on ComfyUI's MODEL."""

from .wrappers import strategies_of, with_cache

__all__ = ["strategies_of", "with_cache"]
