"""What the students of the tiny Flux draw in 8, 6 and 4 steps, and in how many pictures it is what the prompt says.

    python benchmarks/student_pictures.py

with this project's Python. Prints the table that is in docs/development.md, and draws docs/pictures/few_steps.jpg: a
row for each number of steps, the same prompts and seeds in each.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from demo_models import InDiffusers
from PIL import Image
from quality_rows import uncached
from subjects import FewSteps

from cache_core.demo.still_life import prompt_of, random_still_life

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from training.picture_yardstick import share_right  # noqa: E402

COUNT, SHOWN, FIRST_SEED, SHIFT = 48, 8, 9000, 3.0


def main() -> None:
    """Sample, judge, print and draw."""
    generator, rows = random.Random("students"), []
    told = [random_still_life(generator) for _ in range(COUNT)]
    with torch.no_grad():
        for steps in (8, 6, 4):
            student, row, pictures = InDiffusers(FewSteps(steps)), uncached(steps), []
            for seed, one in enumerate(told, FIRST_SEED):
                (latent,) = student.sample(row, SHIFT, [prompt_of(one)], student.subject.noise(seed))
                pictures += student.subject.decode(latent).clamp(0, 1)
            print(steps, {word: f"{share:.0%}" for word, share in share_right(pictures, told).items()}, flush=True)
            rows.append(torch.cat(pictures[:SHOWN], dim=2))
    sheet = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte()
    Image.fromarray(sheet.numpy()).save(ROOT / "docs" / "pictures" / "few_steps.jpg", quality=92)


if __name__ == "__main__":
    main()
