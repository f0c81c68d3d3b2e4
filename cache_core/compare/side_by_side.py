"""The same picture uncached, with caches and with fewer steps: a table of numbers and a sheet of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..strategy.strategy import Strategy
from .quality import psnr, ssim

if TYPE_CHECKING:
    from PIL import Image

    from .sheet import Cell, Label

FEWER_STEPS = "Fewer steps, no cache"
MAGNIFIED = 8  # times: a difference of an eighth of the range is as bright as can be, one that nobody sees stays dark
SMALLEST = 256  # pixels of a picture on the sheet, so that the words above it fit
NO_TWIN = "None: it took as long as the uncached run."
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

    def judged(self, reference: Sampled) -> Sampled:
        """The same run, with its closeness to this one."""
        decibels = psnr(self.pictures, reference.pictures)
        similarity = ssim(self.pictures, reference.pictures) if decibels < math.inf else 1.0
        return replace(self, psnr=decibels, ssim=similarity)


@dataclass(frozen=True)
class SideBySide:
    """The runs of one comparison. `twins[i]`: uncached, with as many steps as take the time of `cached[i]`, if any."""

    uncached: Sampled
    cached: Sequence[Sampled]
    twins: Sequence[Sampled | None]
    shown: int = 0  # which of the pictures is on the sheet; the numbers are of all

    def rows(self) -> list[dict[str, Any]]:
        """The numbers of each run, ready for JSON: the uncached one, then each cached one and its twin."""
        pairs = zip(self.cached, self.twins, strict=True)
        return [self._row(run) for run in (self.uncached, *(run for pair in pairs for run in pair)) if run is not None]

    def table(self) -> str:
        """The rows as aligned plain text, and what there is to say of them."""
        rows = self.rows()
        notes = [f"{row['name']}: {row['note']}" for row in rows if row["note"]]
        return "\n".join([aligned([_HEADER, *map(_cells, rows)]), *notes])

    def sheet(self, title: str, subtitle: str = "") -> Image.Image:
        """A column for each run; below it what differs from the uncached picture, and its twin likewise."""
        from .sheet import Label, draw

        runs, twins = [self.uncached, *self.cached], self.twins
        difference = Label("Difference", f"to the uncached picture, x {MAGNIFIED}")
        rows: list[Sequence[Cell]] = [
            [self._heading(run, run.name, run.settings) for run in runs],
            [run.pictures[self.shown] for run in runs],
            [difference, *map(self._difference, self.cached)],
        ]
        if any(twin is not None for twin in twins):
            fewer = Label("Fewer steps", "uncached, in the time that the cache above took")
            rows += [
                [None, *(twin and self._heading(twin, f"{twin.steps} steps") for twin in twins)],
                [fewer, *(Label("", NO_TWIN) if twin is None else twin.pictures[self.shown] for twin in twins)],
                [difference, *(twin and self._difference(twin) for twin in twins)],
            ]
        return draw(title, rows, subtitle, SMALLEST)

    def _row(self, run: Sampled) -> dict[str, Any]:
        numbers = {item.name: getattr(run, item.name) for item in fields(run) if item.name != "pictures"}
        identical = run.psnr == math.inf
        return numbers | {
            "speed_up": self._speed_up(run),
            "psnr": None if identical else run.psnr,  # JSON knows no infinity
            "identical": identical,
        }

    def _speed_up(self, run: Sampled) -> float:
        return self.uncached.seconds / run.seconds

    def _heading(self, run: Sampled, name: str, settings: str = "") -> Label:
        from .sheet import Label

        if run is self.uncached:
            return Label(name, settings, f"{run.seconds:.2f} s")
        share = f"{run.computed_share:.0%} computed, " if run.computed_share is not None else ""
        likeness = "identical" if run.psnr == math.inf else f"{run.psnr:.1f} dB, SSIM {run.ssim:.3f}"
        return Label(name, settings, f"{share}{run.seconds:.2f} s, {self._speed_up(run):.2f}x\n{likeness}")

    def _difference(self, run: Sampled) -> Tensor:
        return (run.pictures[self.shown] - self.uncached.pictures[self.shown]).abs() * MAGNIFIED


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
