"""What a search measured on a model, kept for later, and which of what is kept fits a model and a wish."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from .compare.found import SPEED_UP, Found
from .strategy.setting import counted
from .strategy.strategy import Strategy

MOST_ENTRIES = 200  # of a file
MOST_DECIBELS = 100.0  # what an identical picture is kept as: JSON knows no infinity


@dataclass(frozen=True)
class Identity:
    """Which model it is, whatever LoRAs are on it."""

    family: str
    tensors: int
    parameters: int
    weights: str  # a digest of names, sizes and a few values
    halfway: float  # the noise level halfway through its schedule: another flow shift is another model here


@dataclass(frozen=True)
class Measured:
    """A cache found for a model and a wish, how the runs sampled, and what it gave on a seed not searched on."""

    model: Identity
    wish: str
    wished_speed_up: float  # 0 for a closeness
    steps: int
    sampler: str
    scheduler: str
    cfg: float
    strategy: Strategy
    speed_up: float
    decibels: float
    date: str  # 2026-12-01
    device: str
    is_shared: bool = False  # by somebody else

    @property
    def told(self) -> str:
        """As a sentence."""
        by = f" by a user ({self.device})" if self.is_shared else ""
        how = f"{counted(self.steps, 'step')}, {self.sampler}, {self.scheduler}, cfg {self.cfg:g}"
        numbers = f"{self.speed_up:.1f}x, {self.decibels:.0f} dB"
        return f"Measured on this model{by} on {self.date}: {numbers} ({how}). With others it differs."

    @property
    def key(self) -> tuple[Any, ...]:
        """A later entry with the same key takes its place."""
        return (
            self.model, self.wish, self.wished_speed_up, self.steps, self.sampler, self.scheduler, self.cfg
        )  # fmt: skip


def entry_for(
    found: Found, model: Identity, sampler: str, scheduler: str, cfg: float, device: str, today: date
) -> Measured | None:
    """The entry for what a search found; None where it found no cache worth handing on."""
    if found.strategy is None:
        return None
    wished = found.wish.speed_up if found.wish.name == SPEED_UP else 0.0
    decibels = min(found.judged.decibels, MOST_DECIBELS)
    return Measured(
        model, found.wish.name, wished, found.steps, sampler, scheduler, cfg, found.strategy, found.judged.speed_up,
        decibels, today.isoformat(), device,
    )  # fmt: skip


def fitting(entries: Iterable[Measured], model: Identity, wish: str, steps: int = 0) -> Measured | None:
    """The newest entry for this very model and wish, of so many steps (0: of any)."""
    fit = [each for each in entries if (each.model, each.wish) == (model, wish) and steps in (0, each.steps)]
    return max(reversed(fit), key=lambda each: each.date, default=None)  # of one day the last that was added


def with_entry(entries: Sequence[Measured], entry: Measured) -> tuple[Measured, ...]:
    """All entries and this one, which replaces its like. Where there are too many the oldest go."""
    return (*(each for each in entries if each.key != entry.key), entry)[-MOST_ENTRIES:]


def shared(entries: Iterable[Measured]) -> tuple[Measured, ...]:
    """The same entries, as somebody else's."""
    return tuple(replace(each, is_shared=True) for each in entries)
