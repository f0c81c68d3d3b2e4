"""What a strategy takes of memory in a sampling run of the video blocks, beside what the model takes alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from allocations import Taken, taken_by
from torch import Tensor
from video_blocks import CHANNELS, DTYPE, TEXT, VOLUME, S, Video

from cache_core import CacheRun, Report, Schedule, Strategy

NEGATIVE, POSITIVE = "negative", "positive"
SCALE = 3.0  # of guidance


@dataclass(frozen=True, repr=False)
class Run:
    """One sampling run: what each step took, and the report; None without a strategy."""

    steps: list[Taken]
    report: Report | None

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(step.peak for step in self.steps)


@dataclass(frozen=True, repr=False)
class Extra:
    """What a run with a strategy took more than the same without, in units of S, and of L, the output of each self-
    attention once.
    """

    plain: Run
    cached: Run
    blocks: int
    unit = S  # bytes

    @property
    def peak(self) -> float:
        """The run's above the uncached run's, in S."""
        return (self.cached.peak - self.plain.peak) / S

    @property
    def learning(self) -> float:
        """The peak of the first step above the uncached run's, in S."""
        return (self.cached.steps[0].peak - self.plain.peak) / S

    @property
    def held(self) -> list[float]:
        """At the end of each step, in S."""
        return [(cached.held - plain.held) / S for cached, plain in zip(self.cached.steps, self.plain.steps)]

    def is_reused(self) -> list[bool]:
        """Whether blocks, or parts of them, were in the call of the positive branch; step by step."""
        calls = [call for call in self.cached.report.calls if POSITIVE in call.branches]
        return [call.action != "computed" for call in calls]

    def copied_unused(self, outputs: int) -> list[float]:
        """What was allocated beyond the model's own in steps whose values nothing reuses, in L, step by step.

        A reused call needs the last so many computed `outputs`: these are the steps before that, and those after the
        last reused one. What a model allocates for one branch is half of that for both.
        """
        reused, branches = self.is_reused(), [0] * len(self.plain.steps)
        for call in self.cached.report.calls:
            if call.computed_share > 0:
                branches[call.evaluation - self.cached.report.calls[0].evaluation] += len(call.branches)
        first, last = reused.index(True), len(reused) - reused[::-1].index(True)
        unused = [*range(first - outputs), *range(last, len(reused))]
        own = [self.plain.steps[step].allocated * branches[step] / 2 for step in unused]
        return [(self.cached.steps[step].allocated - own) / (self.blocks * S) for step, own in zip(unused, own)]


def extra_of(strategy: Strategy, blocks: int, steps: int, keeps_axes: bool = False, device: str = "cpu") -> Extra:
    """Samples the model with this strategy and without, on an even schedule with a negative prompt."""
    with torch.no_grad():
        plain = _run(None, blocks, steps, keeps_axes, device)
        return Extra(plain, _run(strategy, blocks, steps, keeps_axes, device), blocks)


@cache
def _run(strategy: Strategy | None, blocks: int, steps: int, keeps_axes: bool, device: str) -> Run:
    sampling = _Sampling(strategy, Video(blocks, keeps_axes).to(device, DTYPE), steps, device)
    taken = taken_by([partial(sampling.step, index) for index in range(steps)], device)
    if sampling.run is None:
        return Run(taken, None)
    sampling.run.report.close()
    sampling.run.free()
    return Run(taken, sampling.run.report)


class _Sampling:
    """Euler's steps, guided by both branches, joined in one call where both are wanted."""

    def __init__(self, strategy: Strategy | None, model: Video, steps: int, device: str) -> None:
        self.model, self.sigmas = model, [1 - step / steps for step in range(steps + 1)]
        self.run = None if strategy is None else CacheRun([strategy], Schedule(self.sigmas))
        generator = torch.Generator().manual_seed(1)
        self.noise = self.latent = torch.randn(1, 1, *VOLUME, generator=generator).to(device, DTYPE)
        text = torch.randn(2, TEXT, CHANNELS, generator=generator).to(device, DTYPE)
        self.texts = {NEGATIVE: text[:1], POSITIVE: text[1:]}

    def step(self, index: int) -> None:
        """One evaluation, and the latent after it."""
        if self.run is None:
            positive, negative = self._predictions(index, True, True)
        else:
            self.run.begin_evaluation()
            sigma, predict = torch.full((1,), self.sigmas[index]), partial(self._predictions, index)
            positive, negative = self.run.call_guidance(self.model, predict, sigma, NEGATIVE, NEGATIVE)
        velocity = negative + SCALE * (positive - negative)
        self.latent = self.latent + (self.sigmas[index + 1] - self.sigmas[index]) * velocity

    def _predictions(self, index: int, with_prompt: bool, without_prompt: bool) -> tuple[Tensor | None, Tensor | None]:
        names = [name for name, wanted in ((NEGATIVE, without_prompt), (POSITIVE, with_prompt)) if wanted]
        latent = torch.cat([self.latent] * len(names))
        text = torch.cat([self.texts[name] for name in names])
        sigma = torch.full((len(names),), self.sigmas[index], device=latent.device)
        forward = partial(self.model, latent, sigma, text)
        output = forward() if self.run is None else self.run.call_model(self.model, forward, sigma, names, names)
        found = dict(zip(names, output.chunk(len(names))))
        return found.get(POSITIVE), found.get(NEGATIVE)
