"""What is on a sheet, and where: runs in columns or in rows, each with its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..strategy.setting import counted
from .sheet import Cell, Label, Sheet, draw
from .side_by_side import Sampled, SideBySide

MAGNIFIED = 8  # times: a difference of an eighth of the range is as bright as can be, one that nobody sees stays dark
SMALLEST = 256  # pixels of a picture in a column of its own, so that the words above it fit
NO_TWIN = "None: it took as long as the uncached run."


def in_columns(compared: SideBySide, title: str, subtitle: str = "") -> Sheet:
    """A column for each run; below it what differs from the uncached picture, and its twin likewise."""
    uncached, cached, twins = compared.uncached, compared.cached, compared.twins

    def picture(run: Sampled) -> Tensor:
        return run.pictures[compared.shown]

    def difference(run: Sampled) -> Tensor:
        return (picture(run) - picture(uncached)).abs() * MAGNIFIED

    runs, different = [uncached, *cached], Label("Difference", f"to the uncached picture, x {MAGNIFIED}")
    rows: list[Sequence[Cell]] = [
        [_heading(run, uncached, run.name, run.settings) for run in runs],
        [picture(run) for run in runs],
        [different, *map(difference, cached)],
    ]
    if any(twin is not None for twin in twins):
        fewer = Label("Fewer steps", "uncached, in the time that the cache above took")
        rows += [
            [None, *(twin and _heading(twin, uncached, counted(twin.steps, "step")) for twin in twins)],
            [fewer, *(Label("", NO_TWIN) if twin is None else picture(twin) for twin in twins)],
            [different, *(twin and difference(twin) for twin in twins)],
        ]
    return draw(title, rows, subtitle, SMALLEST)


def in_rows(runs: Sequence[Sampled], captions: Sequence[str], title: str, subtitle: str = "") -> Sheet:
    """A row for each run, with all its pictures below their captions. The first run is the uncached one."""
    top = [None, *(Label(settings=caption) for caption in captions)]
    rows = [[_heading(run, runs[0], run.name, run.settings), *run.pictures] for run in runs]
    return draw(title, [top, *rows], subtitle)


def _heading(run: Sampled, uncached: Sampled, name: str, settings: str = "") -> Label:
    if run is uncached:
        return Label(name, settings, f"{run.seconds:.2f} s")
    share = f"{run.computed_share:.0%} computed, " if run.computed_share is not None else ""
    likeness = "identical" if run.is_identical else f"{run.psnr:.1f} dB, SSIM {run.ssim:.3f}"
    return Label(name, settings, f"{share}{run.seconds:.2f} s, {run.speed_up(uncached):.2f}x\n{likeness}")
