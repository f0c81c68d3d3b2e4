"""What the students of the tiny Flux draw in 8, 6 and 4 steps, and in how many pictures it is what the prompt says.

    python benchmarks/student_pictures.py

with this project's Python. Prints the table that is in docs/development.md, and draws docs/pictures/few_steps.jpg: a
row for each number of steps, the same prompts and seeds in each.
"""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from subjects import FewSteps
from torch import Tensor, nn

from cache_core.demo.codec import decode
from cache_core.demo.sampling import encode_prompts, flow_sigmas, noise, velocity
from cache_core.demo.still_life import SIZE, prompt_of, random_still_life

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from training.picture_yardstick import share_right  # noqa: E402

COUNT, SHOWN, FIRST_SEED, SHIFT = 48, 8, 9000, 3.0


def drawn(student: nn.Module, steps: int, prompt: str, seed: int) -> Tensor:
    """The picture (3, size, size) that Euler's steps without guidance give."""
    latent, texts = noise(seed, SIZE), encode_prompts([prompt])
    for sigma, following in pairwise(flow_sigmas(steps, SHIFT).tolist()):
        latent = latent + (following - sigma) * velocity(student, latent, torch.tensor([sigma]), *texts)
    return decode(latent)[0].clamp(0, 1)


def main() -> None:
    """Sample, judge, print and draw."""
    generator, rows = random.Random("students"), []
    told = [random_still_life(generator) for _ in range(COUNT)]
    with torch.no_grad():
        for steps in (8, 6, 4):
            student = FewSteps(steps).load_in_diffusers()
            pictures = [drawn(student, steps, prompt_of(one), FIRST_SEED + n) for n, one in enumerate(told)]
            print(steps, {word: f"{share:.0%}" for word, share in share_right(pictures, told).items()}, flush=True)
            rows.append(torch.cat(pictures[:SHOWN], dim=2))
    sheet = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte()
    Image.fromarray(sheet.numpy()).save(ROOT / "docs" / "pictures" / "few_steps.jpg", quality=92)


if __name__ == "__main__":
    main()
