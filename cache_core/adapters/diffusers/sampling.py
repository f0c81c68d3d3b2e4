"""One sampling run of a diffusers transformer, in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...hooks import HookRegistry
from ...run import CacheRun
from ...step import Schedule
from ...strategy import Strategy


class CachedSampling:
    """One sampling run of a transformer through a strategy, for the length of a `with`.

        with CachedSampling(transformer, [TaylorSeerCache()], sigmas) as sampling:
            for sigma in sigmas[:-1]:
                with sampling.call(("uncond", "cond"), sigma):
                    velocity = transformer(...)

    `sampling.report` says what was computed. Calls outside `sampling.call` are ordinary calls.
    """

    def __init__(self, transformer: nn.Module, strategies: Sequence[Strategy], sigmas: Sequence[float]) -> None:
        self.transformer = transformer
        self.run = CacheRun(strategies, Schedule(sigmas))
        self._branches: tuple[str, ...] | None = None
        self._sigma = 0.0
        self._seen: set[tuple[float, str]] = set()
        self._hooks = HookRegistry()
        self._hooks.add(transformer, self._around)

    @property
    def report(self) -> Any:
        return self.run.report

    def __enter__(self) -> CachedSampling:
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()
        self.run.report.close()
        self.run.free()

    @contextmanager
    def call(self, branches: tuple[str, ...], sigma: float) -> Iterator[None]:
        """The next call of the transformer is for these branches of the prompt, joined in this order, at this sigma."""
        self._branches, self._sigma = branches, float(sigma)
        try:
            yield
        finally:
            self._branches = None

    def _around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._branches is None:
            return forward(*args, **kwargs)
        branches, self._branches = self._branches, None  # the call below comes through here again, as an ordinary one
        now = {(self._sigma, branch) for branch in branches}
        if now & self._seen or {sigma for sigma, _ in self._seen} - {self._sigma}:
            self._seen = set()
        if not self._seen:
            self.run.begin_evaluation()
        self._seen |= now
        return self.run.call_model(
            self.transformer, lambda: self.transformer.forward(*args, **kwargs), torch.tensor(self._sigma), branches
        )
