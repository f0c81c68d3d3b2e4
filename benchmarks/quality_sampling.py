"""The sampling for `quality.py`, which starts this file in ComfyUI's Python or, without a ComfyUI, in its own.

    python benchmarks/quality_sampling.py comfyui --pictures 16 --part 1 --parts 2 FILE

FILE then holds this part's records: latents, what ran for them and how long it took.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch
from demo_models import InComfyUI, InDiffusers
from subjects import SUBJECTS, Pictures

if TYPE_CHECKING:
    from quality_rows import Row

FIRST_SEED = 100
PLAIN_EVERY = 8  # runs from one uncached run to the next


class Bench:
    """Samples every row for every picture at every shift, and records what that took."""

    def __init__(self, through: str, subject: Pictures, pictures: int) -> None:
        self.demo = InComfyUI(subject) if through == "comfyui" else InDiffusers(subject)
        self.subject, self.prompts = subject, subject.prompts(pictures)

    def records(self, part: int, parts: int) -> Iterator[dict]:
        """Those of one part of the work."""
        units = list(product(range(len(self.prompts)), self.subject.shifts))[part - 1 :: parts]
        for number, (picture, shift) in enumerate(units, 1):
            began = time.monotonic()
            yield from self._side_by_side(shift, picture)
            took = time.monotonic() - began
            print(f"part {part} of {parts}: {number} of {len(units)} done, {took:.0f} s", file=sys.stderr, flush=True)

    def _side_by_side(self, shift: float, picture: int) -> Iterator[dict]:
        """All rows in random order, each timed against the uncached runs before and after it."""
        from quality_rows import uncached

        run = partial(self._run, shift, picture)
        plain = uncached(self.subject.steps)
        run(plain)  # the first run is slower; and EasyCache takes its times from the model that was loaded last
        before = run(plain)
        yield before
        rows = list(filter(self.demo.can_run, self.subject.rows()))
        random.Random(f"{shift} {picture}").shuffle(rows)
        for at in range(0, len(rows), PLAIN_EVERY):
            between = [run(row) for row in rows[at : at + PLAIN_EVERY]]
            after = run(plain)
            whole = (before["seconds"] + after["seconds"]) / 2
            yield from (record | {"time": record["seconds"] / whole} for record in between)
            before = after

    def _run(self, shift: float, picture: int, row: Row) -> dict:
        noise = self.subject.noise(FIRST_SEED + picture)
        self.demo.tally.clear()
        began = time.process_time()
        (latent,) = self.demo.sample(row, shift, [self.prompts[picture]], noise)
        return {
            "seconds": time.process_time() - began,
            "through": self.demo.name,
            "method": row.method,
            "setting": row.setting,
            "shift": shift,
            "picture": picture,
            "latent": latent,
            "blocks": self.demo.tally.blocks,
            "attentions": self.demo.tally.attentions,
        }


def main() -> None:
    """Sample one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("through", choices=("comfyui", "diffusers"))
    parser.add_argument("file")
    parser.add_argument("--model", choices=SUBJECTS, default="picture")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--parts", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # on matrices this small a second thread costs more than it gives
    with torch.no_grad():
        torch.save(
            list(Bench(asked.through, SUBJECTS[asked.model], asked.pictures).records(asked.part, asked.parts)),
            asked.file,
        )


if __name__ == "__main__":
    main()
