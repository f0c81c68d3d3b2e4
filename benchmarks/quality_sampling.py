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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from demo_models import InComfyUI, InDiffusers
from subjects import SUBJECTS, Pictures

if TYPE_CHECKING:
    from quality_rows import Row

FIRST_SEED = 100
PLAIN_EVERY = 8  # runs from one uncached run to the next


@dataclass(frozen=True)
class Task:
    """One sampling run: of a batch of different pictures, or of as many copies of one."""

    row: Row
    shift: float
    pictures: tuple[int, ...]


class Bench:
    """Samples every row for every picture at every shift, and records what that took."""

    def __init__(self, through: str, subject: Pictures, pictures: int) -> None:
        self.demo = InComfyUI(subject) if through == "comfyui" else InDiffusers(subject)
        self.subject, self.prompts = subject, subject.prompts(pictures)

    def records(self, part: int, parts: int) -> Iterator[dict]:
        """Those of one part of the work."""
        pictures, size = range(len(self.prompts)), self.subject.batch
        batches = [tuple(pictures[at : at + size]) for at in pictures[::size]]
        units = [(shift, batch) for batch in batches for shift in self.subject.shifts][part - 1 :: parts]
        for number, (shift, batch) in enumerate(units, 1):
            began = time.monotonic()
            yield from self._side_by_side(shift, batch)
            took = time.monotonic() - began
            print(f"part {part} of {parts}: {number} of {len(units)} done, {took:.0f} s", file=sys.stderr, flush=True)

    def _side_by_side(self, shift: float, batch: tuple[int, ...]) -> Iterator[dict]:
        """All rows in random order, each timed against the uncached runs before and after it."""
        from quality_rows import uncached

        plain = Task(uncached(self.subject.steps), shift, batch)
        self._run(plain)  # the first run is slower; and EasyCache takes its times from the model that was loaded last
        before = self._run(plain)
        yield before
        tasks = self._tasks(shift, batch)
        for at in range(0, len(tasks), PLAIN_EVERY):
            between = [self._run(task) for task in tasks[at : at + PLAIN_EVERY]]
            after = self._run(plain)
            whole = (before["seconds"] + after["seconds"]) / 2
            yield from (record | {"time": record["seconds"] / whole} for record in between)
            before = after

    def _tasks(self, shift: float, batch: tuple[int, ...]) -> list[Task]:
        """A cache that looks at the pictures decides for the whole batch, so it is given copies of one at a time."""
        tasks = [
            Task(row, shift, pictures)
            for row in filter(self.demo.can_run, self.subject.rows())
            for pictures in self._batches(row, batch)
        ]
        random.Random(f"{shift} {batch}").shuffle(tasks)
        return tasks

    def _batches(self, row: Row, batch: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(one,) * len(batch) for one in batch] if row.picture_decides else [batch] * self.subject.planned_runs

    def _run(self, task: Task) -> dict:
        prompts = [self.prompts[picture] for picture in task.pictures]
        noises = torch.cat([self.subject.noise(FIRST_SEED + picture) for picture in task.pictures])
        self.demo.tally.clear()
        began = time.process_time()
        latents = self.demo.sample(task.row, task.shift, prompts, noises)
        seconds = time.process_time() - began
        return {
            "through": self.demo.name,
            "method": task.row.method,
            "setting": task.row.setting,
            "shift": task.shift,
            "latents": dict(zip(task.pictures, latents)),  # one of the copies
            "blocks": self.demo.tally.blocks / len(prompts),
            "attentions": self.demo.tally.attentions / len(prompts),
            "seconds": seconds / len(prompts),
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
