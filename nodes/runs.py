"""The last sampling runs of this ComfyUI process, for the nodes and the route that show them."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache_core.report.report import Report
from .compat import workflow_of
from .events import Announcer, announcer

try:
    from comfy_execution.utils import get_executing_context
except ImportError:  # runs then belong to no prompt

    def get_executing_context() -> None:
        return None


MOST_RUNS = 32


@dataclass
class ShownRun:
    """One sampling run, from its first moment: its report, the prompt it belongs to, and which latent came out."""

    progress: Report  # fills up while the run goes on
    prompt_id: str | None
    sampler_id: str | None
    workflow: str | None  # id of the workflow in the browser
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.time)  # seconds since 1970
    latent: str | None = None  # fingerprint of the result; None before the end, and of a run that was cancelled
    shown_by: tuple[str, ...] = ()  # ids of Cache Report nodes
    browser: Announcer | None = None  # that queued it
    speed_up: float | None = None  # against an uncached run beside it, where there was one
    is_trial: bool = False  # one of many that a search made: it made no samples that another node has

    @property
    def report(self) -> dict[str, Any]:
        """Everything known, ready for JSON."""
        return self._told()

    def was_measured(self, speed_up: float) -> None:
        """It took so much less time than an uncached run beside it: say that, not what its own calls let expect."""
        self.speed_up = speed_up
        if self.browser is not None:
            self.browser.ended()

    def _told(self, first: int = 0) -> dict[str, Any]:
        told = self.progress.so_far(first)
        if self.speed_up is not None:
            told["totals"]["speed_up"] = self.speed_up
        return told

    def as_dict(self, first: int = 0) -> dict[str, Any]:
        """Ready for JSON; of the model calls, those from number `first` on."""
        return {
            "id": self.id,
            "began": self.began,
            "prompt_id": self.prompt_id,
            "workflow": self.workflow,
            "sampler": self.sampler_id,
            "nodes": [owner for owner in dict.fromkeys(self.progress.owners) if owner],
            "shown_by": list(self.shown_by),
            "first": first,
            "report": self._told(first),
        }


class Watched:
    """Follows one run for the browser that queued it, and remembers what came out."""

    def __init__(self, run: ShownRun, browser: Announcer | None) -> None:
        self.run, self.browser = run, browser
        self.called()

    def called(self) -> None:
        """One more model call is in the report."""
        if self.browser is not None:
            self.browser.changed()

    def ended(self, latent: Any) -> None:
        """The run is over."""
        if latent is not None:
            self.run.latent = fingerprint(latent)
        if self.browser is not None:
            self.browser.ended()


_RUNS: deque[ShownRun] = deque(maxlen=MOST_RUNS)  # of the process, like ComfyUI's own history; bounded


def watch(report: Report) -> Watched:
    """Remember and show a run that begins now. Called inside the sampler node's execution."""
    context, prompt_id = get_executing_context(), current_prompt()
    run = ShownRun(report, prompt_id, context.node_id if context else None, workflow_of(prompt_id))
    _RUNS.append(run)
    run.browser = announcer(run.as_dict)
    return Watched(run, run.browser)


def run_of(latent: Any) -> ShownRun | None:
    """The run that this latent came out of or, where another node has changed it since, the prompt's last run."""
    wanted, ended = fingerprint(latent), [run for run in reversed(_RUNS) if run.latent is not None]
    prompt_id = current_prompt()
    of_prompt = (run for run in ended if prompt_id is not None and run.prompt_id == prompt_id and not run.is_trial)
    return next((run for run in ended if run.latent == wanted), None) or next(of_prompt, None)


def runs(**wanted: str) -> list[ShownRun]:
    """The runs with these attributes, newest first."""
    return [run for run in reversed(list(_RUNS)) if all(getattr(run, name) == value for name, value in wanted.items())]


def current_prompt() -> str | None:
    """The prompt that is executing."""
    context = get_executing_context()
    return context.prompt_id if context else None


def fingerprint(latent: Any) -> str:
    """The latent's contents as a short text, the same whether ComfyUI keeps it in float32 or float16."""
    tensors = latent.unbind() if getattr(latent, "is_nested", False) else [latent]
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()
