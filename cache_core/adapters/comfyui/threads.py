"""Multi-GPU work units: ComfyUI runs the branches of an evaluation in threads, one for each device and its clone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...run.run import CacheRun

POOL = "multigpu_thread_pool"  # the model option that holds comfy.multigpu.MultiGPUThreadPool
CLONES = "multigpu_clones"  # the one that holds the clones, patchers by device


def fits(model_options: dict[str, Any]) -> bool:
    """Whether ComfyUI runs branches in threads, in the way that is known here."""
    pool = model_options.get(POOL)
    return hasattr(pool, "submit") and hasattr(pool, "get_result") and CLONES in model_options


class Threads:
    """ComfyUI's pool of threads for one evaluation, in which the clone of the last device leads.

    It has what is batched first where all branches run on one device: the negative prompt, usually. So both decide, and
    draw, alike. The threads begin when it is known which devices have work.
    """

    def __init__(self, run: CacheRun, model_options: dict[str, Any]) -> None:
        self._run, self._pool, self._clones = run, model_options[POOL], model_options[CLONES]
        self._given: list[tuple[torch.device, Callable[[], Any]]] = []
        self._awaited: set[torch.device] = set()  # whose results nobody has asked for

    def submit(self, device: torch.device, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Keep a device's work until somebody asks for a result."""
        self._given.append((device, partial(function, *args, **kwargs)))

    def get_result(self, device: torch.device) -> Any:
        """Wait for a device's work: its result, or the error that ended it."""
        if self._given:
            models = [self._model_on(other) for other, _ in self._given]
            self._run.state.evaluation.begin_threads(models[-1], models)
        while self._given:
            other, function = self._given.pop(0)
            self._awaited.add(other)
            self._pool.submit(other, self._watched, other, function)
        self._awaited.discard(device)
        return self._pool.get_result(device)

    def finish(self) -> None:
        """One device's work has failed: let no result of the others be taken for one of what is asked next."""
        while self._awaited:
            self._pool.get_result(self._awaited.pop())

    def _watched(self, device: torch.device, function: Callable[[], Any]) -> Any:
        try:
            return function()
        finally:
            self._run.state.evaluation.ended_call(self._model_on(device))

    def _model_on(self, device: torch.device) -> torch.nn.Module:
        return self._clones[device].model.diffusion_model
