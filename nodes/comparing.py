"""Samples uncached, with each cache and with fewer steps, until each verdict is outside the clock's noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from ..cache_core.adapters.comfyui import strategies_of
from ..cache_core.adapters.comfyui.sampling import (
    Pictures,
    Rounds,
    SamplerInputs,
    TimedSamples,
    decoded,
    have_the_same_weights,
    is_video,
)
from ..cache_core.compare.quality import closeness
from ..cache_core.compare.side_by_side import FEWER_STEPS, Sampled, SideBySide, described, instead_of
from ..cache_core.compare.verdict import MOST_ROUNDS, Clock, Verdict, judged, stands, too_close
from . import runs

NO_CACHE = "it has no Refrain cache and was sampled as it is"
OTHER_WEIGHTS = "its weights are not those of the uncached model, so the picture differs for that reason too"


@dataclass
class _Cached:
    """A model with a cache, and what is known of it."""

    model: Any
    seconds: list[float] = field(default_factory=list)  # of each round
    shown: list[runs.ShownRun] = field(default_factory=list)  # its runs, for the browser
    sampled: Sampled | None = None
    verdict: Verdict | None = None

    @property
    def is_decided(self) -> bool:
        return self.verdict is not None and stands(self.verdict, len(self.seconds))


class Comparison:
    """One comparison. Of what is decoded it holds the uncached run and one other, then a picture of each run."""

    def __init__(self, model: Any, models: Sequence[Any], steps: int, sampler: SamplerInputs, vae: Any) -> None:
        self.model, self.steps, self.vae = model, steps, vae
        self.cached = [_Cached(other) for other in models]
        self.rounds, self.clock = Rounds(model, sampler), Clock(steps)
        self.fewer: dict[int, Sampled] = {}  # uncached runs of fewer steps
        self.reference = Pictures(torch.empty(0))  # the uncached run's, all of them
        self.at, self.of_how_many = 0, ""  # which of a run's pictures is shown, and of how many

    def run(self) -> SideBySide:
        """Time and judge in rounds, at most three."""
        for _ in range(MOST_ROUNDS):
            self._time()
            self._judge()
            if all(each.is_decided for each in self.cached):
                break
        self.rounds.finish()
        return self._result()

    def _time(self) -> None:
        """A round: the uncached run, and beside it those of the caches that are not decided. The first is decoded."""
        undecided = [each for each in self.cached if not each.is_decided]
        self._begin([self.model, *(each.model for each in undecided)], self.steps * (1 + len(undecided)))
        uncached = self.rounds.run(self.model, self.steps)
        self.clock.begin(uncached.seconds)
        made = [(each, self._cached_run(each)) for each in undecided]
        if self.reference:
            return
        self.reference = decoded(self.vae, uncached.samples)
        self._choose_picture(is_video(uncached.samples))
        for each, run in made:
            share, note = _told_by(each.shown, each.model, self.model)
            each.sampled = self._sampled(run, *_words_of(each.model), self.steps, share, note)

    def _begin(self, models: Sequence[Any], steps: int) -> None:
        """Load these models again, as a VAE may have pushed them out. So many steps follow, and maybe another run."""
        self.rounds.expect(1 + steps + self.steps)
        self.rounds.load(models, self.steps)

    def _cached_run(self, each: _Cached) -> TimedSamples:
        """A run and its report, looked up at once: another run might make the same latent."""
        run = self.rounds.run(each.model, self.steps)
        told = runs.run_of(run.samples) if strategies_of(each.model) else None
        each.shown += [told] if told else []
        each.seconds.append(run.seconds)
        return run

    def _judge(self) -> None:
        """Sample uncached at the steps that a verdict needs. In the end the clock is taken as those runs show it."""
        undecided = [each for each in self.cached if not each.is_decided]
        bought = [self.clock.buys(each.seconds) for each in undecided]
        while wanted := {said for each in zip(undecided, bought) if isinstance(said := self._said(*each), int)}:
            self._sample_fewer(sorted(wanted))
        for each in undecided:
            now = self.clock.buys(each.seconds)
            said = self._said(each, now)
            each.verdict = too_close(now, self.steps, self.fewer) if isinstance(said, int) else said

    def _said(self, each: _Cached, bought: tuple[int, int]) -> Verdict | int:
        fewer = {steps: run.psnr for steps, run in self.fewer.items()}
        return judged(each.sampled.psnr, bought, self.steps, fewer)

    def _sample_fewer(self, counts: Sequence[int]) -> None:
        self._begin([self.model], sum(counts))
        made = [(count, self.rounds.run(self.model, count)) for count in counts]
        for count, run in made:
            self.clock.add(count, run.seconds)
            self.fewer[count] = self._sampled(run, FEWER_STEPS, "", count, count / self.steps)

    def _sampled(
        self, run: TimedSamples, name: str, used: str, steps: int, share: float | None, note: str = ""
    ) -> Sampled:
        pictures = decoded(self.vae, run.samples)
        decibels, similarity = closeness(pictures, self.reference)
        shown = pictures[self.at][None]
        return Sampled(name, used, steps, run.seconds, share, shown, note, psnr=decibels, ssim=similarity)

    def _choose_picture(self, of_video: bool) -> None:
        count = len(self.reference)
        self.at = count // 2 if of_video else 0
        if count > 1:
            what = "frames; the middle one is shown" if of_video else "pictures; the first is shown"
            self.of_how_many = f", of all {count} {what}"

    def _result(self) -> SideBySide:
        """Seconds are the median of the rounds; a cache's in proportion to the uncached run beside it."""
        seconds = self.steps * median(a_step for a_step, *_ in self.clock.rounds)
        uncached = Sampled("Uncached", "", self.steps, seconds, 1.0, self.reference[self.at][None])
        cached = []
        for each in self.cached:
            share = self.clock.share(each.seconds)
            cached.append(replace(each.sampled, seconds=seconds * share, verdict=each.verdict))
            for shown in each.shown:
                shown.was_measured(1 / share)
        twins = [self.fewer.get(run.verdict.steps) for run in cached]
        named = [twin and replace(twin, settings=instead_of(run, cached)) for run, twin in zip(cached, twins)]
        return SideBySide(uncached, cached, named)


def _words_of(model: Any) -> tuple[str, str]:
    return described(strategies_of(model)) if strategies_of(model) else ("No Refrain cache", "")


def _told_by(shown: Sequence[runs.ShownRun], model: Any, uncached: Any) -> tuple[float | None, str]:
    """What a run computed, by its own report, and what there is to say of it."""
    notes = [] if have_the_same_weights(model, uncached) else [OTHER_WEIGHTS]
    if not shown:
        return None, "; ".join([NO_CACHE, *notes])
    report = shown[0].report
    totals = report["totals"]
    nothing_reused = [] if totals["reused"] + totals["forecast"] else [report["summary"]]
    return totals["computed_share"], "; ".join([*nothing_reused, *notes, *report["notes"]])
