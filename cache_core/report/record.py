"""The record of one model call."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import torch

from ..strategy.step import Step


class Stopwatch:
    """Times a `with` block on the device, without waiting for it until the seconds are read.

    Where a device runs on its own and can't time itself, there are none: the time to queue its work tells nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        self._ended = self._now()

    @property
    def seconds(self) -> float | None:
        if self._began is None or self._ended is None:
            return None
        if isinstance(self._ended, float):
            return self._ended - self._began
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended) / 1000

    @property
    def is_ready(self) -> bool:
        """Whether reading the seconds would not wait."""
        return self._ended is None or isinstance(self._ended, float) or self._ended.query()

    def _now(self) -> Any:
        """By the host's clock, as an event of the device, or None."""
        if self._device.type == "cpu":
            return time.perf_counter()
        try:
            is_cuda = self._device.type == "cuda"
            event = torch.cuda.Event(enable_timing=True) if is_cuda else torch.Event(self._device, enable_timing=True)
            event.record()
        except (RuntimeError, AttributeError, TypeError):  # no such events: DirectML, or an older torch
            return None
        return event


class StepReading(Protocol):
    """Where the step of a call is read from: `is_ready` if that would not wait for the device."""

    is_ready: bool
    step: Step


@dataclass
class CallRecord:
    """One model call. What is still on the device is read in `settle`, when the run is over."""

    reading: StepReading | None
    branches: tuple[str, ...]
    action: str  # computed, reused or forecast
    reason: str
    measure: float | None  # what the strategy compared with its threshold
    computed_share: float  # of the blocks, or of the sites where the strategy has others
    watch: Stopwatch | None
    evaluation: int = 0  # all model calls of one evaluation have its number
    step: Step | None = None
    seconds: float | None = None  # None while they are not known, and where the device can't be timed
    threshold: float | None = None
    strategy: str = ""  # title of the one that reused, or gave the reason
    attention_only: bool = False  # only attentions were reused in it: the rest of the model ran

    @property
    def in_part(self) -> bool:
        """Whether it was neither computed nor skipped as a whole."""
        return self.action != "computed" and (self.attention_only or self.computed_share > 0.5)

    def settle(self) -> None:
        """Read step and seconds, and let go of what they are read from."""
        if self.watch is not None:
            self.step, self.seconds = self.reading.step, self.watch.seconds
            self.reading = self.watch = None

    def settle_if_ready(self) -> None:
        """Read now what needs no waiting for the device. What does stays unknown until `settle`."""
        watch, reading = self.watch, self.reading  # another thread may let go of them meanwhile
        if self.seconds is None and watch is not None and watch.is_ready:
            self.seconds = watch.seconds
        if self.step is None and reading is not None and reading.is_ready:
            self.step = reading.step

    def abandon(self) -> None:
        """Let go of the device: what is not known stays so."""
        self.settle_if_ready()
        self.reading = self.watch = None

    def as_dict(self) -> dict[str, Any]:
        """As far as it is known, ready for JSON."""
        return {
            "step": self.step.index if self.step else None,
            "sigma": self.step.sigma if self.step else None,
            "evaluation": self.evaluation,
            "branches": list(self.branches),
            "action": self.action,
            "strategy": self.strategy,
            "reason": self.reason,
            "measure": self.measure if self.measure is not None and isfinite(self.measure) else None,
            "threshold": self.threshold,
            "computed_share": self.computed_share,
            "in_part": self.in_part,
            "seconds": self.seconds,
        }
