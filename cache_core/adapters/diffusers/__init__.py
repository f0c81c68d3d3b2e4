"""Caching strategies on diffusers' transformers. Importing this does not import diffusers; using it does."""

from .api import Handle, apply, cache_context, disable_cache, enable_cache
from .finding import find_settings

__all__ = ["apply", "Handle", "enable_cache", "disable_cache", "cache_context", "find_settings"]
