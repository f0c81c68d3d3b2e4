"""What a cache is worth beside uncached samplers of as many model calls: fewer steps, and those of another sampler.

    PYTHON benchmarks/yardsticks.py [--pictures N] [--steps 20 50] [--out FILE]

with ComfyUI's Python, on its CPU. The trained demo model, cfg 3, at flow shifts 1, 3 and 6, prompts and seeds as in
quality.py, under four samplers. Pictures are compared with the user's own uncached ones, and with the exact solution:
the same noise and prompt with 400 steps. Writes the tables of docs/benchmarks/yardsticks.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
from demo_models import InComfyUI
from repair import sampled

if TYPE_CHECKING:
    from quality_rows import Row

KEPT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "yardsticks.md"
EXACT_STEPS = 400
EULER, SECOND_ORDER = "euler", ("dpmpp_2m", "res_multistep", "uni_pc")
HEADING = """# Yardsticks

Made by `benchmarks/yardsticks.py`: {pictures} pictures of the demo model in {through}, cfg 3, one at a time.
Each cell has the median PSNR in dB at flow shift 1 / 3 / 6. *Calls* are those of the whole model; of First Block Cache
the blocks that ran, as calls. Fewer steps have as many calls, rounded up. *Own* is the uncached picture of the same
sampler and steps. *Exact* is what {steps} steps of Euler give. "Best other" is the best of dpmpp_2m, res_multistep and
uni_pc in each cell by itself, and of Euler where the sampler is none."""


@dataclass(frozen=True)
class Seen:
    """What one way of sampling gave at all shifts."""

    calls: float  # of the whole model, for a picture; the mean of the shifts
    own: tuple[float, ...]  # dB to the uncached picture of the same sampler and steps, by shift
    exact: tuple[float, ...]  # dB to the exact solution, by shift


class Bench:
    """Samples each way once."""

    def __init__(self, pictures: int) -> None:
        self.demo, self.pictures = InComfyUI(), pictures
        self.sampled = cache(self._sampled)

    def _sampled(self, row: Row, shift: float) -> list[tuple[torch.Tensor, int]]:
        print(f"{row.sampler}, {row.steps} steps, {row.method}, shift {shift:g}", file=sys.stderr, flush=True)
        return sampled(self.demo, row, shift, self.pictures)

    def seen(self, row: Row, own: Row) -> Seen:
        """This way of sampling, beside the user's own one without a cache."""
        exact = replace(own, sampler=EULER, steps=EXACT_STEPS)
        calls = (
            mean(self._blocks(row, shift) / self._blocks(own, shift) for shift in self.demo.subject.shifts) * own.steps
        )
        to_own, to_exact = (
            tuple(self._closeness(row, other, shift) for shift in self.demo.subject.shifts) for other in (own, exact)
        )
        return Seen(calls, to_own, to_exact)

    def _blocks(self, row: Row, shift: float) -> float:
        return mean(blocks for _, blocks in self.sampled(row, shift))

    def _closeness(self, row: Row, other: Row, shift: float) -> float:
        from cache_core.compare.quality import psnr

        pairs = zip(self.sampled(row, shift), self.sampled(other, shift), strict=True)
        return median(min(psnr(one, reference), 100.0) for (one, _), (reference, _) in pairs)


def table(bench: Bench, sampler: str, steps: int) -> Iterator[str]:
    """Every cache under this sampler, each followed by the uncached samplers of as many calls."""
    from quality_rows import FEWER_STEPS, Row, uncached

    own = replace(uncached(steps), sampler=sampler)
    yield f"## {sampler}, {steps} steps\n\n| method | calls | to own | to exact |\n|---|---:|---|---|"
    yield line("uncached", bench.seen(own, own))
    for name, strategy in caches():
        seen = bench.seen(Row(name, strategy=strategy, sampler=sampler, steps=steps), own)
        yield line(f"**{name}**", seen)
        fewer = Row(FEWER_STEPS, sampler=sampler, steps=ceil(seen.calls - 0.05))
        yield line(f"{fewer.steps} steps", bench.seen(fewer, own))
        others = [each for each in (EULER, *SECOND_ORDER) if each != sampler]
        yield line(
            f"{fewer.steps} steps, best other",
            best([bench.seen(replace(fewer, sampler=other), own) for other in others]),
        )


def caches() -> Iterator[tuple[str, Any]]:
    """The two that can skip whole calls."""
    from cache_core.strategies.first_block import FirstBlockCache
    from cache_core.strategies.taylorseer import TaylorSeerCache

    yield "First Block Cache, 0.12", FirstBlockCache()
    yield "TaylorSeer, 1.5x asked for", TaylorSeerCache(target_speedup=1.5)
    for interval in (2, 3):
        yield f"TaylorSeer, interval {interval}", TaylorSeerCache(cache_interval=interval)


def best(several: list[Seen]) -> Seen:
    """The best of each cell."""
    own, exact = (tuple(map(max, zip(*(getattr(seen, name) for seen in several)))) for name in ("own", "exact"))
    return Seen(several[0].calls, own, exact)


def line(name: str, seen: Seen) -> str:
    own, exact = (
        " / ".join("-" if value >= 100 else f"{value:.1f}" for value in each) for each in (seen.own, seen.exact)
    )
    return f"| {name} | {seen.calls:.1f} | {own} | {exact} |"


def main() -> None:
    """Sample, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--samplers", nargs="+", default=[EULER, *SECOND_ORDER])
    parser.add_argument("--out", type=Path, default=KEPT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(asked.pictures)
    parts = [HEADING.format(pictures=asked.pictures, through=bench.demo.name, steps=EXACT_STEPS)]
    with torch.no_grad():
        for steps in asked.steps:
            parts += ["\n".join(table(bench, sampler, steps)) for sampler in asked.samplers]
    asked.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(asked.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
