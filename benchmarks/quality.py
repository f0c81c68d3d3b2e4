"""How close cached pictures stay to uncached ones, against simply taking fewer steps.

    python benchmarks/quality.py

with ComfyUI's Python. The demo model in real ComfyUI sampling, 16 pictures, 20 Euler steps, cfg 3, flow shifts 1, 3
and 6; each row's PSNR is the median against the uncached pictures of the same shift, followed by that of an uncached
run with as many steps as the row computed model calls (interpolated between whole numbers of steps).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from functools import cache
from statistics import mean, median

import torch
from random_models import start_comfyui

STEPS, GUIDANCE, SHIFTS, FIRST_SEED = 20, 3.0, (1.0, 3.0, 6.0), 100


def main() -> None:
    """Print the table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    count = parser.parse_args().pictures
    start_comfyui("cpu")
    from cache_core.strategies.first_block import FirstBlockCache
    from cache_core.strategies.taylorseer import TaylorSeerCache

    cases = {
        "First Block Cache, 0.08": FirstBlockCache(residual_diff_threshold=0.08),
        "First Block Cache, 0.12": FirstBlockCache(),
        "First Block Cache, 0.3": FirstBlockCache(residual_diff_threshold=0.3),
        "TaylorSeer, interval 2": TaylorSeerCache(cache_interval=2),
        "TaylorSeer, interval 3": TaylorSeerCache(cache_interval=3),
        "TaylorSeer, interval 5": TaylorSeerCache(cache_interval=5),
        "TaylorSeer as published, interval 3": TaylorSeerCache(cache_interval=3, spacing="steps", weights="recursion"),
    }
    pictures = Pictures(count)
    print("| method | " + " | ".join(f"shift {shift:g}: computed, dB (fewer steps)" for shift in SHIFTS) + " |")
    print("|---|" + "---|" * len(SHIFTS))
    for name, strategy in cases.items():
        print(f"| {name} | " + " | ".join(pictures.row(strategy)) + " |", flush=True)


class Pictures:
    """The pictures of the demo model, uncached and cached."""

    def __init__(self, count: int) -> None:
        from cache_core.adapters.comfyui import demo
        from cache_core.demo.scene import prompt_of, random_scene

        generator = random.Random(0)
        self.prompts = [prompt_of(random_scene(generator)) for _ in range(count)]
        self.model, self.clip = demo.load_model(), demo.load_clip()

    def row(self, strategy) -> Iterator[str]:
        """One cell for each shift."""
        for shift in SHIFTS:
            pictures, share = self.cached(shift, strategy)
            psnr = self.closeness(pictures, shift)
            yield f"{share:.0%}, **{psnr:.1f}** ({self.fewer_steps(shift, share):.1f})"

    def cached(self, shift: float, strategy) -> tuple[torch.Tensor, float]:
        """Each picture sampled by itself, and the share of model calls that were computed."""
        from cache_core.adapters.comfyui import with_cache

        reports = []
        model = with_cache(self.shifted(shift), strategy, lambda report, _: reports.append(report))
        latents = [self.sample(model, [number], STEPS) for number in range(len(self.prompts))]
        share = mean(report.count("computed") / len(report.calls) for report in reports)
        return self.decoded(torch.cat(latents)), share

    @cache  # noqa: B019 - lives as long as the program
    def plain(self, shift: float, steps: int) -> torch.Tensor:
        """All pictures in one batch, uncached."""
        return self.decoded(self.sample(self.shifted(shift), range(len(self.prompts)), steps))

    def closeness(self, pictures: torch.Tensor, shift: float) -> float:
        """Median PSNR to the uncached pictures, in dB."""
        from cache_core.demo.quality import psnr

        return median(map(psnr, pictures, self.plain(shift, STEPS)))

    def fewer_steps(self, shift: float, share: float) -> float:
        """Closeness of an uncached run that computes as much."""
        whole = int(share * STEPS + 1e-6)
        below, above = (self.closeness(self.plain(shift, whole + more), shift) for more in (0, 1))
        return below + max(share * STEPS - whole, 0.0) * (above - below)

    @cache  # noqa: B019
    def shifted(self, shift: float):
        """The model with this flow shift."""
        from cache_core.adapters.comfyui.demo import shifted

        return shifted(self.model, shift)

    def sample(self, model, numbers, steps: int) -> torch.Tensor:
        """Latents of these pictures in one batch, each with its own seed."""
        from cache_core.adapters.comfyui.demo import sample

        prompts = [self.prompts[number] for number in numbers]
        return sample(model, self.clip, prompts, seed=FIRST_SEED + numbers[0], steps=steps, cfg=GUIDANCE)

    @staticmethod
    def decoded(latents: torch.Tensor) -> torch.Tensor:
        """ComfyUI's latents as pictures, by the exact linear decoder."""
        from cache_core.demo.codec import FLUX_SCALE, FLUX_SHIFT, decode

        return decode((latents - FLUX_SHIFT) * FLUX_SCALE)


if __name__ == "__main__":
    with torch.no_grad():
        main()
