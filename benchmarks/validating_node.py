"""Put into a ComfyUI's custom_nodes by templates.py: POST /refrain/validate says what ComfyUI would refuse of a prompt.

Nothing is queued. Kinds of nodes that this ComfyUI lacks are stood in for by ones with the slots of the workflow.
"""

from __future__ import annotations

import logging
from typing import Any

import execution
from aiohttp import web
from server import PromptServer

import nodes

NODE_CLASS_MAPPINGS: dict[str, type] = {}


def stand_in(takes: dict[str, str], gives: list[str]) -> type:
    """A node with these slots, none of which must be connected."""

    class StandIn:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = tuple(gives), "stand", "test", not gives

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"optional": {name: (kind,) for name, kind in takes.items()}}

    return StandIn


@PromptServer.instance.routes.post("/refrain/validate")
async def validate(request: web.Request) -> web.Response:
    """All that is wrong with {"prompt": ..., "stand_ins": {kind: {"takes": ..., "gives": ...}}}."""
    asked = await request.json()
    lacking = {kind: stand_in(**slots) for kind, slots in asked["stand_ins"].items()}
    nodes.NODE_CLASS_MAPPINGS.update(lacking)
    logging.disable(logging.ERROR)
    try:
        _, error, _, node_errors = await execution.validate_prompt("refrain", asked["prompt"], None)
    finally:
        logging.disable(logging.NOTSET)
        for kind in lacking:
            del nodes.NODE_CLASS_MAPPINGS[kind]
    return web.json_response({"error": error, "node_errors": node_errors})
