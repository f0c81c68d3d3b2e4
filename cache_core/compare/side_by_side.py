"""The same picture uncached, with caches and with fewer steps: what was measured, and the table of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..strategy.strategy import Strategy
from .quality import closeness
from .verdict import Verdict

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
    pictures: Tensor  # (pictures, 3, height, width) in 0..1: those to show
    note: str = ""
    verdict: Verdict | None = None  # of a cache
    psnr: float = math.inf  # dB
    ssim: float = 1.0

    @property
    def is_identical(self) -> bool:
        """To the uncached one, bit for bit."""
        return self.psnr == math.inf

    def judged(self, reference: Sampled) -> Sampled:
        """The same run, with its closeness to this one, by the pictures to show."""
        decibels, similarity = closeness(self.pictures, reference.pictures)
        return replace(self, psnr=decibels, ssim=similarity)

    def speed_up(self, uncached: Sampled) -> float:
        """How many times as fast as the uncached one."""
        return uncached.seconds / self.seconds


@dataclass(frozen=True)
class SideBySide:
    """The runs of one comparison. `twins[i]`: uncached, with the fewer steps that `cached[i]` is judged by, if any."""

    uncached: Sampled
    cached: Sequence[Sampled]
    twins: Sequence[Sampled | None]

    @property
    def runs(self) -> list[Sampled]:
        """The uncached one, then each cached one and its twin."""
        pairs = zip(self.cached, self.twins, strict=True)
        return [self.uncached, *(run for pair in pairs for run in pair if run is not None)]

    @property
    def pictures(self) -> Tensor:
        """One of each run, (runs, 3, height, width): the uncached one, all caches in turn, then their twins in turn."""
        runs = [self.uncached, *self.cached, *filter(None, self.twins)]
        return torch.stack([run.pictures[0] for run in runs])


def rows(runs: Sequence[Sampled]) -> list[dict[str, Any]]:
    """The numbers of each run, ready for JSON. The first run is the uncached one."""
    return [_row(run, runs[0]) for run in runs]


def table(runs: Sequence[Sampled]) -> str:
    """The rows as aligned plain text, the verdicts, and what else there is to say."""
    verdicts = [f"{_titled(run.name, run.settings)}: {run.verdict.text}" for run in runs if run.verdict]
    notes = [f"{run.name}: {run.note}" for run in runs if run.note]
    return "\n".join([aligned([_HEADER, *map(_cells, rows(runs))]), *verdicts, *notes])


def described(strategies: Sequence[Strategy]) -> tuple[str, str]:
    """The strategies' names; and of their settings what decides, the first or a wish, and what is not as it comes."""
    return " + ".join(strategy.title for strategy in strategies), "; ".join(map(_settings, strategies))


def instead_of(run: Sampled, others: Sequence[Sampled]) -> str:
    """Which cache fewer steps answer, in words; with its settings where another has the same name."""
    is_alone = [other.name for other in others].count(run.name) == 1
    return f"instead of {run.name}" if is_alone else f"instead of {run.name}, {run.settings}"


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
        "verdict": run.verdict and run.verdict.text,
        "outcome": run.verdict and run.verdict.outcome,
    }


def _settings(strategy: Strategy) -> str:
    first, *others = (item for item in fields(strategy) if item.metadata.get("shown"))
    told = [item for item in others if getattr(strategy, item.name) != item.default]
    if not any(item.name == "target_speedup" for item in told):
        told.insert(0, first)
    return ", ".join(f"{item.name} {getattr(strategy, item.name)}" for item in told)


def _titled(name: str, settings: str) -> str:
    return f"{name} ({settings})" if settings else name


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    share, decibels = row["computed_share"], row["psnr"]
    return (
        _titled(row["name"], row["settings"]),
        str(row["steps"]),
        "-" if share is None else f"{share:.0%}",
        f"{row['seconds']:.2f}",
        f"{row['speed_up']:.2f}x",
        "equal" if decibels is None else f"{decibels:.1f}",
        f"{row['ssim']:.3f}",
    )
