"""`find_settings`: a wish in, a strategy out, found with a pipeline of diffusers in at most a dozen runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...compare.finding import MOST_RUNS, Search
from ...compare.found import JUDGED, SEARCHED, Found, How, Measure, Wish
from ...compare.quality import closeness
from ...ladders import ladders
from ...strategy.strategy import Strategy
from .api import apply

NO_TRANSFORMER = "find_settings: the pipeline has no transformer of its own. Pass one that has `pipe.transformer`."
TWO = "find_settings: the pipeline has two transformers (Wan 2.2). It searches one only."


def find_settings(
    pipe: Any, wish: str = "hardly", speed_up: float = 1.5, steps: int = 20, seed: int = 0, most_runs: int = MOST_RUNS,
    **inputs: Any,
) -> Found:  # fmt: skip
    """What `wish` ("can't see it", "hardly", "draft", or "speed-up" with its number) comes to on this pipeline.

    `inputs` are the pipeline's own: prompt, guidance_scale, height. It is searched on `seed` and judged on the next.
    `found.told` says how good it is; `found.strategy` goes to `apply`, and is None where fewer steps are closer.
    Nothing stays on the pipeline, whatever happens. Raises ValueError for an unknown wish, a pipeline with no or two
    transformers, and one with a cache on.

        found = find_settings(pipe, "can't see it", prompt="a red ball", steps=28)
        handle = apply(pipe.transformer, found.strategy, scheduler=pipe.scheduler)
    """
    if getattr(pipe, "transformer", None) is None:
        raise ValueError(NO_TRANSFORMER)
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(TWO)
    wished = Wish(wish, speed_up)
    return Search(_Sampling(pipe, steps, seed, inputs), ladders(wished), wished, steps, most_runs).run()


class _Sampling:
    """Makes the runs of a search. It holds the uncached pictures of the seed at hand."""

    def __init__(self, pipe: Any, steps: int, seed: int, inputs: dict[str, Any]) -> None:
        self.pipe, self.steps, self.inputs = pipe, steps, inputs
        self.seeds = {SEARCHED: seed, JUDGED: seed + 1}
        self.reference: Sequence[Tensor] = ()

    def __call__(self, how: How, seed: str) -> Measure:
        if isinstance(how, int):
            pictures, seconds, _ = self._run(None, how, self.seeds[seed])
            self.reference = pictures if how == self.steps else self.reference
            return Measure(closeness(pictures, self.reference)[0], seconds, how / self.steps)
        pictures, seconds, share = self._run(how, self.steps, self.seeds[seed])
        return Measure(closeness(pictures, self.reference)[0], seconds, share)

    def _run(self, strategy: Strategy | None, steps: int, seed: int) -> tuple[Sequence[Tensor], float, float | None]:
        """All pictures or frames, (3, height, width) in 0..1 each; seconds, the VAE's too; the share computed."""
        pipe, generator = self.pipe, torch.Generator("cpu").manual_seed(seed)
        cached = apply(pipe.transformer, strategy, scheduler=pipe.scheduler) if strategy else nullcontext()
        with cached as handle:
            began = time.perf_counter()
            made = pipe(
                num_inference_steps=steps, generator=generator, output_type="pt", return_dict=False, **self.inputs
            )[0]
            pictures = list(
                made.detach().float().nan_to_num(0.0).clamp(0, 1).cpu().flatten(0, -4)
            )  # waits for the device
            seconds = time.perf_counter() - began
            report = handle.report if handle else None
            return pictures, seconds, report.computed_share if report else None
