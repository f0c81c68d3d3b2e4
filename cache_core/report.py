"""The report: what was computed, reused and forecast in one sampling run, why, and how long it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import isfinite
from statistics import median
from typing import Any

import torch

from .step import Step
from .strategy import Strategy

logger = logging.getLogger(__name__)


class Stopwatch:
    """Times a `with` block on the device, without waiting for it until the seconds are read."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        self._ended = self._now()

    @property
    def seconds(self) -> float:
        if not self._on_cuda:
            return self._ended - self._began
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended) / 1000

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class CallRecord:
    """One model call. What is still on the device is read in `settle`, when the run is over."""

    step_of_call: Callable[[], Step] | None
    branches: tuple[str, ...]
    action: str  # computed, reused or forecast
    reason: str
    measure: float | None  # what the strategy compared with its threshold
    computed_share: float  # of the blocks, or of the sites where the strategy has others
    watch: Stopwatch | None
    evaluation: int = 0  # all model calls of one evaluation have its number
    step: Step | None = None
    seconds: float = 0.0

    def settle(self) -> None:
        """Read step and seconds, and let go of what they are read from."""
        if self.watch is not None:
            self.step, self.seconds = self.step_of_call(), self.watch.seconds
            self.step_of_call = self.watch = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step.index,
            "sigma": self.step.sigma,
            "branches": list(self.branches),
            "action": self.action,
            "reason": self.reason,
            "measure": self.measure if self.measure is not None and isfinite(self.measure) else None,
            "computed_share": self.computed_share,
            "seconds": self.seconds,
        }


@dataclass
class Report:
    """All model calls of one run."""

    strategies: tuple[Strategy, ...]
    steps: int
    blocks: str = ""  # the chains found, in words
    calls: list[CallRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bytes_held: int = 0  # the most at any time
    seconds: float = 0.0  # of the whole sampling run, set by the adapter

    def add(self, record: CallRecord) -> None:
        """One more model call."""
        self.calls.append(record)

    def note(self, text: str) -> None:
        """Something the user should know, said once and logged."""
        if text not in self.notes:
            self.notes.append(text)
            logger.info("Refrain: %s", text)

    def held(self, total: int) -> None:
        """This many bytes are kept at the moment."""
        self.bytes_held = max(self.bytes_held, total)

    def close(self) -> None:
        """The run is over: read what was left on the device."""
        for call in self.calls:
            call.settle()

    def count(self, *actions: str, branch: str | None = None) -> int:
        """Model calls with one of these actions, of all branches or of one."""
        return sum(call.action in actions and (branch is None or branch in call.branches) for call in self.calls)

    @property
    def computed_share(self) -> float:
        """Share of the blocks' (or sites') runs that were computed: 1.0 is all."""
        branches = sum(len(call.branches) for call in self.calls)
        return sum(call.computed_share * len(call.branches) for call in self.calls) / branches if branches else 1.0

    @property
    def speed_up(self) -> float | None:
        """Of the model calls, against this run's own computed evaluations (their median). None if none was computed."""
        seconds: dict[int, float] = {}
        for call in self.calls:
            seconds[call.evaluation] = seconds.get(call.evaluation, 0.0) + call.seconds
        reusing = {call.evaluation for call in self.calls if call.action != "computed"}
        computed = [spent for evaluation, spent in seconds.items() if evaluation not in reusing]
        total = sum(seconds.values())
        return median(computed) * len(seconds) / total if computed and total else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        self.close()
        branches = sorted({branch for call in self.calls for branch in call.branches})
        actions = ("computed", "reused", "forecast")
        return {
            "summary": self.line(),
            "strategies": [
                {"title": strategy.title, "settings": _settings(strategy), "off": strategy.is_off}
                for strategy in self.strategies
            ],
            "steps": self.steps,
            "blocks": self.blocks,
            "totals": {
                "calls": len(self.calls),
                **{action: self.count(action) for action in actions},
                "branches": {b: {action: self.count(action, branch=b) for action in actions} for b in branches},
                "computed_share": self.computed_share,
                "speed_up": self.speed_up,
                "model_seconds": sum(call.seconds for call in self.calls),
                "seconds": self.seconds,
                "bytes_held": self.bytes_held,
            },
            "notes": list(self.notes),
            "calls": [call.as_dict() for call in self.calls],
        }

    def line(self) -> str:
        """The run in one line, for the log."""
        names = " + ".join(strategy.title for strategy in self.strategies)
        parts = [
            f"{self.count(action)} {action}" for action in ("computed", "reused", "forecast") if self.count(action)
        ]
        text = f"Refrain, {names}: {len(self.calls)} model calls: {', '.join(parts)}"
        if self.count("reused", "forecast"):
            text += f"; {self.computed_share:.0%} of the blocks computed"
            text += f", {self.speed_up:.2f}x" if self.speed_up else ""
            text += f", {_amount(self.bytes_held)} held"
        elif all(strategy.is_off for strategy in self.strategies):
            text += "; these settings never reuse"
        elif self.calls:
            text += f"; nothing reused: {self.calls[-1].reason or '; '.join(self.notes)}"
        return text


def _amount(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _settings(strategy: Strategy) -> dict[str, Any]:
    return {item.name: getattr(strategy, item.name) for item in fields(strategy) if item.metadata.get("shown")}
