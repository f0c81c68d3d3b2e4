"""Makes the sampling runs of a search for cache settings, and puts the chosen ones side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..cache_core.adapters.comfyui import with_cache
from ..cache_core.adapters.comfyui.sampling import Pictures, Rounds, SamplerInputs, TimedSamples, decoded, is_video
from ..cache_core.compare.finding import MOST_RUNS, Search
from ..cache_core.compare.found import JUDGED, SEARCHED, Found, How, Measure, Wish
from ..cache_core.compare.quality import closeness
from ..cache_core.compare.side_by_side import FEWER_STEPS, Sampled, SideBySide, described, instead_of
from ..cache_core.ladders import ladders
from ..cache_core.strategy.strategy import Strategy
from . import runs

UNCACHED = "Uncached"


class Finding:
    """One search. Of what is decoded it holds the uncached run of the seed at hand, and a picture of each run."""

    def __init__(self, model: Any, steps: int, sampler: SamplerInputs, vae: Any) -> None:
        self.model, self.steps, self.vae = model, steps, vae
        self.seeds = {SEARCHED: sampler.seed, JUDGED: (sampler.seed + 1) % 2**64}
        self.rounds = Rounds(model, sampler)
        self.reference = Pictures(torch.empty(0))  # the uncached run of this seed, all its pictures
        self.sampled: list[Sampled] = []  # each run, in the order they were made

    def run(self, wish: Wish) -> Found:
        """Search and judge. What ends a sampling run, such as a cancel, ends it."""
        found = Search(self._sample, ladders(wish), wish, self.steps).run()
        self.rounds.finish()
        return found

    def side_by_side(self, found: Found) -> SideBySide:
        """The chosen cache beside the uncached run and fewer steps, on the judging seed."""
        shown = [each for each in (found.uncached, found.judged, found.fewer) if each is not None]
        uncached, *others = (self.sampled[found.points.index(each)] for each in shown)
        cached = [replace(each, verdict=found.verdict) for each in others[:1]]
        fewer = [replace(each, settings=instead_of(cached[0], cached)) for each in others[1:]]
        return SideBySide(uncached, cached, fewer or [None] * len(cached))

    def _sample(self, how: How, seed: str) -> Measure:
        self.rounds.expect((MOST_RUNS - len(self.sampled)) * (self.steps + 1))
        self.rounds.load([self.model], self.steps)  # the VAE may have pushed it out
        if isinstance(how, Strategy):
            run = self.rounds.run(with_cache(self.model, how, watch=runs.watch), self.steps, self.seeds[seed])
            share = _computed_in(run)
            return self._measured(run, decoded(self.vae, run.samples), *described([how]), self.steps, share)
        run = self.rounds.run(self.model, how, self.seeds[seed])
        pictures = decoded(self.vae, run.samples)
        if how == self.steps:
            self.reference = pictures
        return self._measured(run, pictures, UNCACHED if how == self.steps else FEWER_STEPS, "", how, how / self.steps)

    def _measured(
        self, run: TimedSamples, pictures: Pictures, name: str, settings: str, steps: int, share: float | None
    ) -> Measure:
        decibels, similarity = closeness(pictures, self.reference)
        shown = pictures[len(pictures) // 2 if is_video(run.samples) else 0][None]
        sampled = Sampled(name, settings, steps, run.seconds, share, shown, psnr=decibels, ssim=similarity)
        self.sampled.append(sampled)
        return Measure(decibels, run.seconds, share)


def _computed_in(run: TimedSamples) -> float | None:
    """The share that a cached run computed, by its own report. It was a trial, and made no samples for others."""
    told = runs.run_of(run.samples)
    if told is None:
        return None
    told.is_trial = True
    return told.report["totals"]["computed_share"]
