"""GET /refrain/runs: the last sampling runs as JSON, for the nodes after a reload and for headless use."""

from __future__ import annotations

import re
from typing import Any

from aiohttp import web

from . import runs
from .compat import prompt_server

PATH = "/refrain/runs"
FILTERS = {
    "prompt_id": "the id that POST /prompt answered",
    "workflow": "the id that is saved in a workflow",
}
_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)


def add_routes() -> None:
    """Let ComfyUI's server answer. Does nothing where ComfyUI is used as a library.

    ComfyUI does not start if two answer at one path.
    """
    server = prompt_server()
    if server is not None and all(getattr(route, "path", None) != PATH for route in server.routes):
        server.routes.get(PATH)(answer)


async def answer(request: web.Request) -> web.Response:
    """{"runs": [...]}, newest first. Status 400 with a sentence in `error` for a question that has no answer."""
    query = request.query
    if refusal := _refusal(query):
        return web.json_response({"error": refusal}, status=400)
    found = runs.runs(**{name: query[name] for name in FILTERS if name in query})
    return web.json_response({"runs": [run.as_dict() for run in found]})


def _refusal(query: Any) -> str:
    for name in query:
        if name not in FILTERS:
            return f"There is no parameter {name[:50]!r}. Known are: {', '.join(FILTERS)}."
        if len(query.getall(name)) > 1:
            return f"{name} is given more than once. Ask for one at a time."
        if not _ID.fullmatch(query[name]):
            given = f"{name} is {query[name][:50]!r}, which is no id"
            return f"{given}. Give {FILTERS[name]}: 1 to 100 letters, digits and - _ . :"
    return ""
