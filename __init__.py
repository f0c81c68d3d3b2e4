"""Refrain: caching nodes for ComfyUI. This file imports nothing until ComfyUI asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes."""
    import logging

    try:
        from .nodes import RefrainExtension

        return RefrainExtension()
    except Exception:
        logging.exception("Refrain could not load its nodes.")  # ComfyUI itself prints no traceback
        raise
