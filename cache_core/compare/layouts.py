"""What is on a sheet, and where: runs in rows, each with its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..strategy.setting import counted
from .sheet import Cell, Label, Sheet, draw
from .side_by_side import Sampled, SideBySide
from .verdict import PLAIN, UNSEEN

MAGNIFIED = 8  # times: a difference of an eighth of the range is as bright as can be, one that nobody sees stays dark
SMALLEST = 256  # pixels of a picture
LARGER = 1.9  # times as large are the words that are read on a node, where the sheet is shrunk
TONES = {"worth it": "good", "look": "unsure", "too close": "unsure", "no better": "bad", "no faster": "bad"}
HOW_TO_READ = (
    f"dB: how close a picture is to the uncached one. Above {UNSEEN} you will not see the difference, below {PLAIN} "
    f"you will. Differences are {MAGNIFIED} times as bright as they are. At the right, what a cache has to beat: fewer "
    "steps without one, in the same time."
)
AS_BRIGHT = f"Difference from the uncached pictures, {MAGNIFIED} times as bright as it is"
NO_TWIN = "No fewer steps to show: it may take as long as the uncached run."


def against_fewer_steps(compared: SideBySide, title: str, subtitle: str = "") -> Sheet:
    """The uncached picture; below it a row for each cache: verdict, picture and difference, and its twin's likewise."""
    uncached = compared.uncached
    read = Label(settings=f"{HOW_TO_READ}\n{subtitle}")
    rows: list[Sequence[Cell]] = [[Label(uncached.name, summary=f"{uncached.seconds:.2f} s"), _picture(uncached), read]]
    for cached, twin in zip(compared.cached, compared.twins, strict=True):
        heads = [_caption(cached, uncached, ""), Label(settings="Difference")]
        shown = [_verdict(cached), _picture(cached), _difference(cached, uncached)]
        if twin is None:
            rows += [[None, *heads], [*shown, Label(settings=NO_TWIN)]]
            continue
        heads += [_caption(twin, uncached, f"{counted(twin.steps, 'step')}, no cache"), Label(settings="Difference")]
        rows += [[None, *heads], [*shown, _picture(twin), _difference(twin, uncached)]]
    return draw(title, rows, smallest=SMALLEST, words=LARGER)


def in_rows(runs: Sequence[Sampled], captions: Sequence[str], title: str, subtitle: str = "") -> Sheet:
    """For each run its pictures, and below them how they differ from those of the first, the uncached run."""
    uncached, *others = runs
    rows: list[Sequence[Cell]] = [[None, *(Label(settings=caption) for caption in captions)]]
    rows.append([_heading(uncached, uncached), *uncached.pictures])
    for run in others:
        rows.append([_heading(run, uncached), *run.pictures])
        rows.append([Label(settings=AS_BRIGHT), *_differences(run, uncached)])
    return draw(title, rows, subtitle)


def _picture(run: Sampled) -> Tensor:
    return run.pictures[0]


def _difference(run: Sampled, uncached: Sampled) -> Tensor:
    return _differences(run, uncached)[0]


def _differences(run: Sampled, uncached: Sampled) -> Tensor:
    return (run.pictures - uncached.pictures).abs() * MAGNIFIED


def _verdict(cached: Sampled) -> Label:
    share = "" if cached.computed_share is None else f"{cached.computed_share:.0%} computed, "
    numbers = f"{share}{cached.seconds:.2f} s"
    if cached.verdict is None:
        return Label(cached.name, cached.settings, numbers)
    return Label(cached.name, cached.settings, numbers, cached.verdict.text, TONES[cached.verdict.outcome])


def _caption(run: Sampled, uncached: Sampled, name: str) -> Label:
    return Label(summary=f"{name}\n{run.speed_up(uncached):.2f}x, {_likeness(run)}".strip())


def _likeness(run: Sampled) -> str:
    return "identical" if run.is_identical else f"{run.psnr:.1f} dB"


def _heading(run: Sampled, uncached: Sampled) -> Label:
    if run is uncached:
        return Label(run.name, run.settings, f"{run.seconds:.2f} s")
    share = f"{run.computed_share:.0%} computed, " if run.computed_share is not None else ""
    likeness = _likeness(run) if run.is_identical else f"{_likeness(run)}, SSIM {run.ssim:.3f}"
    return Label(run.name, run.settings, f"{share}{run.seconds:.2f} s, {run.speed_up(uncached):.2f}x\n{likeness}")
