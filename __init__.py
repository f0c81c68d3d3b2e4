"""Refrain: caching nodes for ComfyUI. This file imports nothing of ComfyUI's until that asks for the nodes."""

import sys
from pathlib import Path

TWICE = (
    "There are two copies of Refrain. This ComfyUI has loaded the one in {first}, which works. "
    "Move {later} out of custom_nodes and restart ComfyUI. (To keep this one, move the other out instead.)"
)
SPACE = (
    "Refrain's folder has a space in its name: {folder}. Its nodes work, but ComfyUI finds no scripts in there, "
    "so they draw nothing. Rename the folder to refrain and restart ComfyUI."
)


def other_copy() -> Path | None:
    """The folder of another copy of this pack that this ComfyUI has loaded already."""
    node = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get("RefrainCacheReport")
    file = getattr(sys.modules.get(getattr(node, "__module__", "")), "__file__", None)
    folder = Path(file).parents[1] if file else None
    return None if folder == Path(__file__).parent else folder


WEB_DIRECTORY = "./web" if other_copy() is None else None  # a page that loads our scripts twice would fail


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes."""
    import logging

    first = other_copy()
    if first is not None:
        raise ImportError(TWICE.format(first=first, later=Path(__file__).parent))
    if " " in Path(__file__).parent.name:
        logging.warning(SPACE.format(folder=Path(__file__).parent))
    try:
        from .nodes import RefrainExtension

        return RefrainExtension()
    except Exception:
        logging.exception("Refrain could not load its nodes.")  # ComfyUI itself prints no traceback
        raise
