"""What differs between the versions of ComfyUI that we support."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

CATEGORY = "Refrain"
SEARCH_ALIASES = ["cache", "speed up", "faster", "TeaCache", "FBCache", "WaveSpeed", "EasyCache", "cache-dit"]

_KNOWN = set(inspect.signature(io.Schema).parameters)


def schema(**settings: Any) -> io.Schema:
    """An io.Schema without the keywords that this ComfyUI does not know; one of those would unload the whole pack."""
    settings = {"category": CATEGORY, "search_aliases": SEARCH_ALIASES} | settings
    return io.Schema(**{name: value for name, value in settings.items() if name in _KNOWN})
