"""What the server keeps of a prompt that has ended: its outputs, its runs and their counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_core.demo.server import Server

COUNTS = ("computed", "reused", "forecast")


def outputs(server: Server, prompt_id: str, kind: str) -> list[Any]:
    """What the nodes of a prompt put out under this name, such as "images"."""
    return [shown for output in server.history(prompt_id)["outputs"].values() for shown in output.get(kind, [])]


def reported(server: Server, prompt_id: str) -> dict[str, Any]:
    """What the Cache Report of a prompt put out."""
    (report,) = outputs(server, prompt_id, "refrain_report")
    return report


def run_of(server: Server, prompt_id: str) -> dict[str, Any]:
    """The one run of a prompt."""
    (run,) = server.get(f"/refrain/runs?prompt_id={prompt_id}")["runs"]
    return run


def counts(totals: dict[str, Any]) -> dict[str, int]:
    """The model calls, by action too; of a report's totals or of the numbers that a view shows."""
    return {name: int(totals[name]) for name in ("calls", *COUNTS)}


def skipped(totals: dict[str, Any]) -> int:
    """How many model calls a cache answered."""
    return totals["reused"] + totals["forecast"]
