"""The same picture uncached, with caches and with fewer steps: what was measured, and the table of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from ..strategy.strategy import Strategy
from .quality import psnr, ssim

FEWER_STEPS = "Fewer steps, no cache"
_HEADER = ("method", "steps", "computed", "seconds", "speed-up", "PSNR dB", "SSIM")


@dataclass(frozen=True)
class Sampled:
    """One sampling run, decoded, and how close it is to the uncached one."""

    name: str
    settings: str
    steps: int
    seconds: float
    computed_share: float | None  # 0..1 of the uncached run's work; None if nobody counted
    pictures: Tensor  # (pictures or frames, 3, height, width) in 0..1
    note: str = ""
    psnr: float = math.inf  # dB
    ssim: float = 1.0

    @property
    def is_identical(self) -> bool:
        """To the uncached one, bit for bit."""
        return self.psnr == math.inf

    def judged(self, reference: Sampled) -> Sampled:
        """The same run, with its closeness to this one."""
        decibels = psnr(self.pictures, reference.pictures)
        similarity = ssim(self.pictures, reference.pictures) if decibels < math.inf else 1.0
        return replace(self, psnr=decibels, ssim=similarity)

    def speed_up(self, uncached: Sampled) -> float:
        """How many times as fast as the uncached one."""
        return uncached.seconds / self.seconds


@dataclass(frozen=True)
class SideBySide:
    """The runs of one comparison. `twins[i]`: uncached, with as many steps as take the time of `cached[i]`, if any."""

    uncached: Sampled
    cached: Sequence[Sampled]
    twins: Sequence[Sampled | None]
    shown: int = 0  # which of the pictures is on the sheet; the numbers are of all

    @property
    def runs(self) -> list[Sampled]:
        """The uncached one, then each cached one and its twin."""
        pairs = zip(self.cached, self.twins, strict=True)
        return [self.uncached, *(run for pair in pairs for run in pair if run is not None)]


def rows(runs: Sequence[Sampled]) -> list[dict[str, Any]]:
    """The numbers of each run, ready for JSON. The first run is the uncached one."""
    return [_row(run, runs[0]) for run in runs]


def table(runs: Sequence[Sampled]) -> str:
    """The rows as aligned plain text, and what there is to say of them."""
    notes = [f"{run.name}: {run.note}" for run in runs if run.note]
    return "\n".join([aligned([_HEADER, *map(_cells, rows(runs))]), *notes])


def described(strategies: Sequence[Strategy]) -> tuple[str, str]:
    """The strategies' names; and the first of their settings, with those that are not as they come."""
    return " + ".join(strategy.title for strategy in strategies), "; ".join(map(_settings, strategies))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        right = [number.rjust(width) for number, width in zip(numbers, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    return "\n".join(lines)


def _row(run: Sampled, uncached: Sampled) -> dict[str, Any]:
    numbers = {item.name: getattr(run, item.name) for item in fields(run) if item.name != "pictures"}
    return numbers | {
        "speed_up": run.speed_up(uncached),
        "psnr": None if run.is_identical else run.psnr,  # JSON knows no infinity
        "identical": run.is_identical,
    }


def _settings(strategy: Strategy) -> str:
    first, *others = (item for item in fields(strategy) if item.metadata.get("shown"))
    told = [first, *(item for item in others if getattr(strategy, item.name) != item.default)]
    return ", ".join(f"{item.name} {getattr(strategy, item.name)}" for item in told)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    share, decibels = row["computed_share"], row["psnr"]
    return (
        f"{row['name']} ({row['settings']})" if row["settings"] else row["name"],
        str(row["steps"]),
        "-" if share is None else f"{share:.0%}",
        f"{row['seconds']:.2f}",
        f"{row['speed_up']:.2f}x",
        "equal" if decibels is None else f"{decibels:.1f}",
        f"{row['ssim']:.3f}",
    )
