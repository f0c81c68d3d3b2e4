"""The methods that the demo compares, and the runs of each over all prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import torch
from torch import Tensor

from ..compare.side_by_side import FEWER_STEPS, Sampled
from ..strategies.first_block import FirstBlockCache
from ..strategies.taylorseer import TaylorSeerCache
from ..strategy.strategy import Strategy

STEPS = 20
GUIDANCE = 3.0


@dataclass(frozen=True)
class Method:
    """A way to make the demo's pictures: with a strategy, or with fewer steps and no cache."""

    name: str
    settings: str
    strategy: Strategy | None = None
    steps: int = STEPS

    def sampled(self, picture: Tensor, share: float, seconds: float) -> Sampled:
        """A picture (3, height, width) made this way, which computed this share of the blocks of its own steps."""
        return Sampled(self.name, self.settings, self.steps, seconds, share * self.steps / STEPS, picture[None])


Sample = Callable[[Method, str, int], Sampled]  # makes one picture: a prompt, and the seed of its noise


def methods() -> list[Method]:
    """The uncached run first, then two strategies, each before fewer steps of about the same cost."""
    return [
        Method("Uncached", f"{STEPS} steps, cfg {GUIDANCE:g}"),
        Method("First Block Cache", "threshold 0.12", FirstBlockCache()),
        Method(FEWER_STEPS, "12 steps", steps=12),
        Method("TaylorSeer Cache", "interval 2", TaylorSeerCache()),
        Method(FEWER_STEPS, "11 steps", steps=11),
    ]


def sampled(
    sample: Sample, methods: Sequence[Method], prompts: Sequence[str], progress: Callable[[], None]
) -> list[Sampled]:
    """One run for each method. Prompt number n has seed n. The first method is the uncached one.

    Each picture is made by all methods before the next, so that a machine that gets slower does so for all of them.
    `progress` is called after each picture.
    """
    sample(methods[0], prompts[0], len(prompts))  # warm up: it loads the model, and the first call is slower
    made: list[list[Sampled]] = []  # of each prompt, by all methods
    for seed, prompt in enumerate(prompts):
        made.append([])
        for method in methods:
            made[-1].append(sample(method, prompt, seed))
            progress()
    return [_together([run.judged(of_all[0]) for run, of_all in zip(runs, made)]) for runs in zip(*made)]


def _together(runs: Sequence[Sampled]) -> Sampled:
    """All pictures and seconds of these runs, the mean of their shares, the median of their closeness."""
    return replace(
        runs[0],
        seconds=sum(run.seconds for run in runs),
        computed_share=fmean(run.computed_share for run in runs),
        pictures=torch.cat([run.pictures for run in runs]),
        psnr=median(run.psnr for run in runs),
        ssim=median(run.ssim for run in runs),
    )
