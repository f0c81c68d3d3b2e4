"""What the setting `repair` changes: closeness to the uncached pictures with it and without, picture by picture.

    PYTHON benchmarks/repair.py [--pictures N] [--sampler NAME]

with ComfyUI's Python, on its CPU. The trained demo model, 20 steps, cfg 3, at flow shifts 1, 3 and 6, prompts and seeds
as in quality.py. Prints the table that is in docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import mean, median

import torch
from demo_models import InComfyUI
from quality_sampling import FIRST_SEED


def main() -> None:
    """Sample, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--sampler", default="euler")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| cache | shift | median | worst | blocks | paired | closer in |\n|---|---|---|---|---|---|---|")
    with torch.no_grad():
        for line in table(InComfyUI(), asked.pictures, asked.sampler):
            print(line, flush=True)


def table(demo: InComfyUI, pictures: int, sampler: str):
    """A line for each cache and shift."""
    from quality_rows import Row, uncached

    from cache_core.strategies.first_block import FirstBlockCache
    from cache_core.strategies.taylorseer import TaylorSeerCache

    caches = [
        *(Row(f"First Block Cache, {t:g}", strategy=FirstBlockCache(residual_diff_threshold=t)) for t in (0.08, 0.12)),
        Row("TaylorSeer, interval 2", strategy=TaylorSeerCache(cache_interval=2)),
        Row("TaylorSeer, interval 2, level `model`", strategy=TaylorSeerCache(cache_interval=2, cache_level="model")),
    ]
    for shift in demo.subject.shifts:
        whole = sampled(demo, replace(uncached(), sampler=sampler), shift, pictures)
        for row in caches:
            off, on = (
                sampled(
                    demo, replace(row, sampler=sampler, strategy=replace(row.strategy, repair=repair)), shift, pictures
                )
                for repair in ("off", "on")
            )
            yield line(row.method, shift, whole, off, on)


def sampled(demo: InComfyUI, row, shift: float, count: int) -> list[tuple[torch.Tensor, int]]:
    """Each picture, and the blocks that ran for it."""
    subject, found = demo.subject, []
    for number, prompt in enumerate(subject.prompts(count)):
        demo.tally.clear()
        (latent,) = demo.sample(row, shift, [prompt], subject.noise(FIRST_SEED + number))
        found += [(picture, demo.tally.blocks) for picture in subject.decode(latent)]
    return found


def line(name: str, shift: float, whole: list, off: list, on: list) -> str:
    """In decibels, without and with."""
    from cache_core.compare.quality import psnr

    before, after = ([psnr(one, other) for (one, _), (other, _) in zip(each, whole)] for each in (off, on))
    shares = [mean(blocks for _, blocks in each) / mean(blocks for _, blocks in whole) for each in (off, on)]
    gains = [closer - far for far, closer in zip(before, after)]
    numbers = [f"{measure(before):.1f} -> {measure(after):.1f}" for measure in (median, min)]
    numbers += ["{:.0%} -> {:.0%}".format(*shares), f"{median(gains):+.1f}"]
    return f"| {' | '.join([name, f'{shift:g}', *numbers, f'{sum(gain > 0 for gain in gains)} of {len(gains)}'])} |"


if __name__ == "__main__":
    main()
