"""What differs between the versions of ComfyUI that we support."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from comfy_api.latest import io

CATEGORY = "Refrain"
SPEED_WORDS = [
    "speed up",
    "speedup",
    "speed",
    "faster",
    "accelerate",
    "acceleration",
    "optimize",
    "optimization",
    "performance",
]
SEARCH_ALIASES = ["cache", *SPEED_WORDS, "Refrain"]

KNOWS_ADVANCED = "advanced" in inspect.signature(io.Int.Input.__init__).parameters  # older ones show all inputs

_KNOWN = set(inspect.signature(io.Schema).parameters)


def schema(**settings: Any) -> io.Schema:
    """An io.Schema without the keywords that this ComfyUI does not know; one of those would unload the whole pack."""
    settings = {"category": CATEGORY} | settings
    return io.Schema(**{name: value for name, value in settings.items() if name in _KNOWN})


def own_id(node: type[io.ComfyNode]) -> str:
    """The id of the node that is executing; empty where a script calls the node's class itself."""
    return str(getattr(node.hidden, "unique_id", None) or "")


def prompt_server() -> Any | None:
    """ComfyUI's running server, or None where ComfyUI is used as a library."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def workflow_of(prompt_id: str | None) -> str | None:
    """The id of the workflow whose prompt is executing, if a browser queued it: two open workflows number alike."""
    queue = getattr(prompt_server(), "prompt_queue", None)
    running = queue.get_current_queue_volatile()[0] if hasattr(queue, "get_current_queue_volatile") else []
    for _, running_id, _, extra_data, *_ in running:
        if running_id == prompt_id:
            at = extra_data
            for key in ("extra_pnginfo", "workflow", "id"):
                at = at.get(key) if isinstance(at, dict) else None
            return at if isinstance(at, str) else None
    return None
