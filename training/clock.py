"""Training for a given time: how far it is, and how the loss goes."""

import time
from collections.abc import Iterator
from statistics import fmean


def until(seconds: float) -> Iterator[float]:
    """Progress from 0.0 to 1.0, once for each training step, until the time is over."""
    begin = time.monotonic()
    while (progress := (time.monotonic() - begin) / seconds) < 1:
        yield progress


def every(seconds: float) -> Iterator[bool]:
    """Asked again and again: whether so many seconds are over since it last said yes."""
    said_at = time.monotonic()
    while True:
        is_due = time.monotonic() - said_at >= seconds
        if is_due:
            said_at = time.monotonic()
        yield is_due


class LossLog:
    """Prints the mean of a loss every few seconds, and of what is left at the end."""

    def __init__(self, name: str, seconds: float = 5.0, steps: int = 0) -> None:
        self.name = name
        self.seconds = seconds
        self.steps = steps  # taken before, by a run that this one goes on from
        self.unprinted: list[float] = []
        self.printed_at = time.monotonic()

    def __enter__(self) -> "LossLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.unprinted:
            self._print()

    def add(self, loss: float) -> None:
        self.steps += 1
        self.unprinted.append(loss)
        if time.monotonic() - self.printed_at >= self.seconds:
            self._print()

    def _print(self) -> None:
        print(f"{self.name}: step {self.steps}, loss {fmean(self.unprinted):.4f}", flush=True)
        self.unprinted.clear()
        self.printed_at = time.monotonic()
