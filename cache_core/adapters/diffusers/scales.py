"""How models and schedulers of diffusers count their timesteps, and what share of noise each stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, inf, log, pi, tan
from typing import Any, NamedTuple

from torch import Tensor

ROUNDING = 2**-8  # relative: timesteps come in bfloat16
NEAR_ZERO = 1e-3  # there a relative bound says nothing
FIRST_WHEN_COUNTING_UP = 0.01  # no run begins with a clean picture
HIGHEST_SHARE = 1.01  # 1 as bfloat16 rounds it
THOUSAND = 1000
SMALLEST_SIGMA = 1e-30  # has a logarithm


class Scale(NamedTuple):
    """A way to count timesteps, falling from noise to picture."""

    share_at: Callable[[Any], Any]  # noise's share of the latent, 1 noisiest; of a number, or of a tensor
    lowest: float
    highest: float

    def holds(self, timestep: float) -> bool:
        """Whether it has this timestep."""
        return self.lowest <= timestep <= self.highest


def _share_of_log(log_sigma: Any) -> Any:
    if isinstance(log_sigma, Tensor):
        return log_sigma.sigmoid()
    return 1 / (1 + exp(min(-log_sigma, 700.0)))  # sigma / (1 + sigma); above that exp overflows


def _share_of_angle(angle: Any) -> Any:
    sigma = angle.tan() if isinstance(angle, Tensor) else tan(angle)
    return 1 - 1 / (1 + sigma)


SHARES = Scale(lambda timestep: timestep, 0.0, HIGHEST_SHARE)  # flow models, and sigma / (1 + sigma)
THOUSANDTHS = Scale(lambda timestep: timestep / THOUSAND, 0.0, inf)
QUARTER_LOGS = Scale(lambda timestep: _share_of_log(4 * timestep), -10.0, 3.0)  # of sigma: EDM
LOGS_TIMES_250 = Scale(lambda timestep: _share_of_log(timestep / 250), -inf, inf)  # consistency models
ANGLES = Scale(_share_of_angle, 0.0, pi / 2 + 0.01)  # TrigFlow


def scale_of(first: float) -> Scale:
    """The scale of a run that begins with this timestep, as far as that one tells."""
    if first < 0:
        return QUARTER_LOGS if QUARTER_LOGS.holds(first) else LOGS_TIMES_250
    if SHARES.holds(first):
        return SHARES
    if first <= QUARTER_LOGS.highest:
        return ANGLES if 1.5 < first <= ANGLES.highest else QUARTER_LOGS  # EDM begins with sigmas below e**6
    return THOUSANDTHS if first <= THOUSAND * HIGHEST_SHARE else LOGS_TIMES_250


class TimestepAxis:
    """How a model counts its timesteps where no scheduler tells: by the first of a run, and which end is noise.

    >>> TimestepAxis(1000).sigma_of(250), TimestepAxis(1.0).sigma_of(0.25), TimestepAxis(0.0).sigma_of(0.75)
    (0.25, 0.25, 0.25)
    >>> TimestepAxis(1.0955).sigma_of(0.0)
    0.5
    """

    def __init__(self, first: float, rises: bool = False) -> None:
        self.scale = scale_of(first)
        begins_low = self.scale in (SHARES, THOUSANDTHS) and self.scale.share_at(first) < FIRST_WHEN_COUNTING_UP
        self.counts_up = rises or begins_low  # as Z-Image and Lumina do

    def holds(self, timestep: float) -> bool:
        """Whether a run on this axis may have this timestep. The scale may turn out to be another than it seemed."""
        if self.counts_up and self.scale is SHARES and timestep > HIGHEST_SHARE:
            self.scale = THOUSANDTHS  # 0 is 0 on both
        return self.scale.holds(timestep)

    def sigma_of(self, timestep: float) -> float:
        """The noise's share, 1 noisiest."""
        return self.sigma_on_device(timestep) if self.holds(timestep) else float(self.counts_up)

    def sigma_on_device(self, timestep: Any) -> Any:
        """The same of a tensor that is not read, on the scale that the run has had so far."""
        share = self.scale.share_at(timestep)
        return 1 - share if self.counts_up else share


@dataclass(frozen=True)
class Telling:
    """What a model is told in place of each of a scheduler's timesteps."""

    entries: Sequence[float]
    top: float | None = None  # it counts up to this, and the entries are what is left

    def near(self, told: float) -> list[int]:
        """Which of them this may be, as rounded as it may come; the nearest first."""
        value = told if self.top is None else self.top - told
        near = [index for index, entry in enumerate(self.entries) if _is_near(value, entry)]
        return sorted(near, key=lambda index: abs(self.entries[index] - value))

    def told_at(self, index: int) -> float:
        """What stands for this entry."""
        return self.entries[index] if self.top is None else self.top - self.entries[index]


class SchedulerTimes:
    """A scheduler's timesteps as numbers, and the noise's share of the latent at each. Waits for the device."""

    def __init__(self, scheduler: Any) -> None:
        self.timesteps: list[float] = scheduler.timesteps.tolist()
        sigmas = getattr(scheduler, "sigmas", None)
        has_list = sigmas is not None and len(sigmas) >= len(self.timesteps)
        self.sigmas: list[float] = sigmas.tolist()[: len(self.timesteps)] if has_list else []  # none: no such list
        self.top = max(getattr(scheduler.config, "num_train_timesteps", None) or 0, THOUSAND)
        self.shares = self._shares()

    def tellings(self) -> Iterator[Telling]:
        """The ways in which diffusers' pipelines, or a cache context, tell a model the time."""
        yield Telling(self.timesteps)
        for factor in (1 / THOUSAND, 1 / self.top):  # Flux, Qwen-Image
            yield Telling([timestep * factor for timestep in self.timesteps])
            yield Telling([timestep * factor for timestep in self.timesteps], top=1.0)  # Z-Image, Lumina 2
        yield Telling(self.timesteps, top=THOUSAND)
        yield Telling(self.shares)  # Cosmos 2, Sana Sprint
        yield Telling([share * THOUSAND for share in self.shares])
        yield Telling(self.sigmas)

    def _shares(self) -> list[float]:
        timesteps, highest = self.timesteps, max(self.timesteps)
        if (scale := self._special_scale()) is not None:
            return [scale.share_at(timestep) for timestep in timesteps]
        shares = [timestep / (1.0 if highest <= HIGHEST_SHARE else self.top) for timestep in timesteps]
        if max(shares) > HIGHEST_SHARE:  # sigmas of a model that adds noise to the picture, counted as a flow's
            return [share / (1 + share) for share in shares]
        if self.sigmas and timesteps[0] < timesteps[-1] and self.sigmas[0] > self.sigmas[-1]:
            return [1 - share for share in shares]  # MiniMax-H3's counts up
        return shares

    def _special_scale(self) -> Scale | None:
        """The scale, if it is neither shares nor thousandths."""
        for scale, factor in ((QUARTER_LOGS, 0.25), (LOGS_TIMES_250, 250.0)):
            logs = [factor * log(max(sigma, SMALLEST_SIGMA)) for sigma in self.sigmas]
            if logs and all(_is_near(timestep, entry) for timestep, entry in zip(self.timesteps, logs)):
                return scale
        highest, lowest = max(self.timesteps), min(self.timesteps)
        if lowest < 0:
            return scale_of(lowest)
        return ANGLES if HIGHEST_SHARE < highest <= ANGLES.highest else None


def _is_near(told: float, entry: float) -> bool:
    return abs(entry - told) <= ROUNDING * abs(entry) + NEAR_ZERO
