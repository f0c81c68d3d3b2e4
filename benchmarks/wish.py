"""What `target_speedup` gives: the share of the model's work that is done, and how close the pictures are.

    PYTHON benchmarks/wish.py [--pictures N]

with ComfyUI's Python, on its CPU. The trained demo model, cfg 3, prompts and seeds as in quality.py. Work is what
PyTorch's own counter of floating-point operations counts in a sampling run, of the uncached run's. Prints the tables
that are in docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median

import torch
from demo_models import InComfyUI
from repair import sampled
from torch.utils.flop_counter import FlopCounterMode

WISHES = (1.3, 1.5, 2.0, 2.5, 3.0)
CLOSE = (1.5, 1.67, 1.8, 2.0, 2.5)
RUNS = ((20, "euler"), (30, "euler"), (50, "euler"), (20, "res_multistep"), (20, "heun"))


def main() -> None:
    """Sample, count, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    pictures = parser.parse_args().pictures
    torch.set_num_threads(1)
    with torch.no_grad():
        demo = InComfyUI()
        for line in (*work(demo), "", *closeness(demo, pictures)):
            print(line, flush=True)


def work(demo: InComfyUI):
    """A line for each cache and run: the work done for each wish."""
    from quality_rows import uncached

    yield f"| cache | run | {' | '.join(f'{wish:g}x: {1 / wish:.1%}' for wish in WISHES)} |"
    yield "|---" * (2 + len(WISHES)) + "|"
    for steps, sampler in RUNS:
        row = replace(uncached(steps), sampler=sampler)
        whole = operations_of(demo, row)
        for strategy in strategies():
            rows = [replace(row, strategy=replace(strategy, target_speedup=wish)) for wish in WISHES]
            shares = [f"{operations_of(demo, each) / whole:.1%}" for each in rows]
            yield f"| {strategy.title} | {steps} steps, {sampler} | {' | '.join(shares)} |"


def operations_of(demo: InComfyUI, row) -> int:
    """Of one picture at shift 3."""
    with FlopCounterMode(display=False) as counter:
        sampled(demo, row, 3.0, 1)
    return counter.get_total_flops()


def closeness(demo: InComfyUI, pictures: int):
    """A line for each cache and wish: dB without and with repair, the worst picture in brackets."""
    from quality_rows import uncached

    from cache_core.strategies.first_block import FirstBlockCache
    from cache_core.strategies.taylorseer import TaylorSeerCache

    shifts = demo.subject.shifts
    rows = {f"fewer steps, {steps}": uncached(steps) for steps in (12, 11, 10, 8)}
    kept = [FirstBlockCache(repair="off"), TaylorSeerCache(cache_interval=2), TaylorSeerCache(cache_interval=3)]
    rows |= {name: replace(uncached(), strategy=each) for name, each in zip(("threshold", "interval 2", "3"), kept)}
    for strategy in strategies():
        for wish in CLOSE:
            rows[f"{strategy.title}, {wish:g}x"] = replace(uncached(), strategy=replace(strategy, target_speedup=wish))
    yield f"| | {' | '.join(f'shift {shift:g}' for shift in shifts)} |"
    yield "|---" * (1 + len(shifts)) + "|"
    whole = {shift: sampled(demo, uncached(), shift, pictures) for shift in shifts}
    for name, row in rows.items():
        yield f"| {name} | {' | '.join(decibels(demo, row, shift, whole[shift]) for shift in shifts)} |"


def decibels(demo: InComfyUI, row, shift: float, whole: list) -> str:
    """Without and with repair, and the share of blocks without."""
    from cache_core.compare.quality import psnr

    told, blocks = [], 0.0
    for repair in ("off", "on") if row.strategy else ("off",):
        one = replace(row, strategy=replace(row.strategy, repair=repair)) if row.strategy else row
        pictures = sampled(demo, one, shift, len(whole))
        near = [psnr(picture, other) for (picture, _), (other, _) in zip(pictures, whole)]
        told.append(f"{median(near):.1f} ({min(near):.1f})")
        blocks = blocks or sum(count for _, count in pictures) / sum(count for _, count in whole)
    return f"{' / '.join(told)}, {blocks:.0%}"


def strategies():
    """The two that can be asked for a speed-up."""
    from cache_core.strategies.first_block import FirstBlockCache
    from cache_core.strategies.taylorseer import TaylorSeerCache

    return TaylorSeerCache(), FirstBlockCache()


if __name__ == "__main__":
    main()
