"""What `quality.py` measured: each row at each shift, against fewer steps, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from quality_rows import FEWER_STEPS
from torch import Tensor

from cache_core.compare.quality import psnr, ssim

COLUMNS = ("blocks", "attention", "time", "PSNR, dB", "5 %", "SSIM", "5 %")
IDENTICAL = 100.0  # dB; closer is equal but for rounding


@dataclass
class Result:
    """One row at one shift: a number for each picture."""

    method: str
    setting: str
    shift: float
    psnr: list[float] = field(default_factory=list)  # dB to the uncached picture
    ssim: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)  # share of the uncached run's
    attentions: list[float] = field(default_factory=list)  # share of the uncached run's
    time: list[float] = field(default_factory=list)  # share of the uncached run's
    worst_frame: list[float] = field(default_factory=list)  # of a video: dB, the lowest of its frames
    flicker: list[float] = field(default_factory=list)  # of a video: dB of what changes from a frame to the next

    def judge(self, frames: Tensor, plain: Tensor) -> None:
        """A picture (1, 3, height, width) or a video (frames, 3, height, width) beside the uncached one."""
        self.psnr.append(_decibels(frames, plain))
        self.ssim.append(ssim(frames, plain))
        if len(frames) > 1:
            self.worst_frame.append(min(map(_decibels, frames, plain)))
            self.flicker.append(_decibels(frames.diff(dim=0), plain.diff(dim=0)))

    def median(self, name: str) -> float:
        return float(np.median(getattr(self, name)))

    def low(self, name: str) -> float:
        """The 5th percentile."""
        return float(np.percentile(getattr(self, name), 5))


class Results:
    """All of a benchmark, and how it was made."""

    def __init__(self, made: dict, results: Iterable[Result]) -> None:
        self.made, self.all = made, list(results)

    @classmethod
    def read(cls, file: Path) -> Results:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return cls(stored["made"], [Result(**result) for result in stored["results"]])

    def write(self, file: Path) -> None:
        """As JSON, a result a line."""
        lines = ",\n".join(json.dumps(_rounded(asdict(result))) for result in self.all)
        file.write_text(f'{{"made": {json.dumps(self.made)},\n"results": [\n{lines}\n]}}\n', encoding="utf-8")

    @property
    def shifts(self) -> list[float]:
        return sorted({result.shift for result in self.all})

    def of(self, shift: float, method: str | None = None) -> list[Result]:
        """At a shift, of this method or of all, in the order of the rows."""
        return [result for result in self.all if result.shift == shift and method in (None, result.method)]

    def gain(self, result: Result, cost: str) -> float | None:
        """Median PSNR over that of fewer steps of the same cost (blocks or time), interpolated between step counts.

        None for a cost above or below that of all step counts that were run.
        """
        fewer = sorted((other.median(cost), other.median("psnr")) for other in self.of(result.shift, FEWER_STEPS))
        costs, closeness = zip(*fewer)
        spent = result.median(cost)
        if not costs[0] <= spent <= costs[-1]:
            return None
        return result.median("psnr") - float(np.interp(spent, costs, closeness))

    def tables(self) -> str:
        """A table in Markdown for each shift."""
        return "\n\n".join(f"## Shift {shift:g}\n\n" + "\n".join(self._table(shift)) for shift in self.shifts)

    def _table(self, shift: float) -> Iterator[str]:
        of_videos = ["worst frame", "flicker"] if self.all[0].flicker else []
        numbers = [*COLUMNS, *of_videos, "same blocks", "same time"]
        yield f"| method | setting | {' | '.join(numbers)} |"
        yield "|---|---|" + "---:|" * len(numbers)
        for result in self.of(shift):
            yield f"| {result.method} | {result.setting} | {' | '.join(self._numbers(result))} |"

    def _numbers(self, result: Result) -> Iterator[str]:
        for share in ("blocks", "attentions", "time"):
            yield f"{result.median(share):.0%}"
        for value in (result.median("psnr"), result.low("psnr")):
            yield _told(value)
        for value in (result.median("ssim"), result.low("ssim")):
            yield f"{value:.3f}"
        for name in ("worst_frame", "flicker") if result.flicker else ():
            yield _told(result.median(name))
        for cost in ("blocks", "time"):
            gain = self.gain(result, cost)
            yield "" if result.method == FEWER_STEPS else "-" if gain is None else f"{gain:+.1f}"


def _decibels(some: Tensor, others: Tensor) -> float:
    return min(psnr(some, others), IDENTICAL)


def _told(decibels: float) -> str:
    return "equal" if decibels >= IDENTICAL else f"{decibels:.1f}"


def _rounded(result: dict) -> dict:
    return {
        name: [round(float(number), 4) for number in value] if isinstance(value, list) else value
        for name, value in result.items()
    }
