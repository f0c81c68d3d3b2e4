"""The last sampling runs of this ComfyUI process, for the nodes that show them."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from comfy_execution.utils import get_executing_context

from ..cache_core.report import Report

MOST_RUNS = 32


@dataclass(frozen=True)
class Run:
    """One finished sampling run: its report, the prompt it belongs to, and which latent came out."""

    prompt_id: str | None
    sampler_id: str | None
    latent: str
    report: dict[str, Any]


_RUNS: deque[Run] = deque(maxlen=MOST_RUNS)  # of the process, like ComfyUI's own history; bounded


def record(report: Report, latent: Any) -> None:
    """Remember a run that just ended. Called inside the sampler node's execution."""
    context = get_executing_context()
    sampler_id = context.node_id if context else None
    _RUNS.append(Run(current_prompt(), sampler_id, fingerprint(latent), report.as_dict()))


def run_of(latent: Any) -> Run | None:
    """The run that this latent came out of or, where another node has changed it since, the prompt's last run."""
    wanted = fingerprint(latent)
    for run in reversed(_RUNS):
        if run.latent == wanted:
            return run
    prompt_id = current_prompt()
    return next((run for run in reversed(_RUNS) if prompt_id is not None and run.prompt_id == prompt_id), None)


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
