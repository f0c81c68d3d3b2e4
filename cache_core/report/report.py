"""The report: what was computed, reused and forecast in one sampling run, why, and how long it took."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from statistics import median
from typing import Any, Literal

from ..strategy.setting import counted
from ..strategy.strategy import Level, Strategy
from .advice import quantiles_of, thresholds_to_try, warnings_of, why_nothing
from .gain import seconds_uncached, steps_of
from .record import CallRecord

logger = logging.getLogger(__name__)
NEVER = "these settings never reuse"
ACTIONS = ("computed", "reused", "forecast")
KEPT = ("bytes_held", "bytes_foretold", "bytes_away", "bytes_foretold_away")
WORK: dict[Level, str] = {  # what is counted where a strategy steps in
    "output": "blocks",
    "model": "blocks",
    "block": "blocks",
    "module": "modules",
    "attention": "attentions",
    "guidance": "predictions",
}
State = Literal["running", "finished", "stopped"]


@dataclass
class Report:
    """All model calls of one run. It can be read at any time, also from another thread, without waiting: `so_far`."""

    strategies: tuple[Strategy, ...]
    steps: int
    blocks: str = ""  # the chains found, in words
    calls: list[CallRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bytes_held: int = 0  # the most at any time
    bytes_foretold: int = 0  # the most that was reserved for what will be held
    bytes_away: int = 0  # the same two in main memory, of what is kept there instead of on the device
    bytes_foretold_away: int = 0
    gaps_repaired: int = 0  # between computed steps
    unrepaired: str = ""  # why they are not, or no more, in a few words
    seconds: float = 0.0  # of the whole sampling run, set by the adapter
    state: State = "running"  # stopped: cancelled or failed
    owners: tuple[str, ...] = ()  # what the caller knows each strategy by
    obstacles: tuple[str, ...] = ()  # why a strategy can reuse nothing on this schedule
    resting: Mapping[Strategy, str] = field(default_factory=dict)  # why these are left out of the run
    on_call: Callable[[], None] | None = field(default=None, repr=False, compare=False)  # told of each; must not wait

    def add(self, record: CallRecord) -> None:
        """One more model call."""
        self.calls.append(record)
        if self.on_call is not None:
            self.on_call()

    def note(self, text: str) -> None:
        """Something the user should know, said once and logged."""
        if text not in self.notes:
            self.notes.append(text)
            logger.info("Refrain: %s", text)

    def held(self, total: int, foretold: int = 0) -> None:
        """This many bytes are kept at the moment; so many will be, by what was seen so far."""
        self.bytes_held, self.bytes_foretold = max(self.bytes_held, total), max(self.bytes_foretold, foretold)

    def held_away(self, total: int, foretold: int) -> None:
        """The same in main memory."""
        self.bytes_away, self.bytes_foretold_away = max(self.bytes_away, total), max(self.bytes_foretold_away, foretold)

    def close(self) -> None:
        """The run is over: read what was left on the device."""
        try:
            for call in self.calls:
                call.settle()
        finally:
            self.state = "finished"

    def stop(self) -> None:
        """The run was cancelled or failed: let go of the device without waiting for it."""
        for call in self.calls:
            call.abandon()
        self.state = "stopped"

    def count(self, *actions: str, branch: str | None = None) -> int:
        """Model calls with one of these actions, of all branches or of one."""
        return sum(call.action in actions and (branch is None or branch in call.branches) for call in self.calls)

    @property
    def computed_share(self) -> float:
        """Share of the runs of blocks, attentions, ... (see `work`) that were computed: 1.0 is all."""
        branches = sum(len(call.branches) for call in self.calls)
        return sum(call.computed_share * len(call.branches) for call in self.calls) / branches if branches else 1.0

    @property
    def work(self) -> str:
        """What that is a share of, in words: those of the blocks, attentions, ... that the strategies step in at."""
        on = [strategy for strategy in self.strategies if not strategy.is_off]
        levels = [level for level in WORK if any(strategy.works_at(level) for strategy in on)]
        inside = [WORK[level] for level in levels if level != "guidance"]  # a prediction left out leaves out these
        return " and ".join(dict.fromkeys(inside)) or WORK["guidance"]

    @property
    def speed_up(self) -> float | None:
        """Of the model calls, against this run's own computed evaluations (their median). None if none was computed."""
        seconds: dict[int, float] = {}
        reusing, unknown = set(), set()
        for call in list(self.calls):
            seconds[call.evaluation] = seconds.get(call.evaluation, 0.0) + (call.seconds or 0.0)
            if call.action != "computed":
                reusing.add(call.evaluation)
            if call.seconds is None:
                unknown.add(call.evaluation)
        known = {evaluation: spent for evaluation, spent in seconds.items() if evaluation not in unknown}
        computed = [spent for evaluation, spent in known.items() if evaluation not in reusing]
        total = sum(known.values())
        return median(computed) * len(known) / total if computed and total else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON. Of a run that is not over, this waits for the device."""
        for call in self.calls:
            call.settle()
        return self.so_far()

    def so_far(self, first: int = 0) -> dict[str, Any]:
        """The same as far as it is known, which waits for nothing; of the calls, those from number `first` on."""
        calls = list(self.calls)
        for call in calls:
            call.settle_if_ready()
        return {
            "summary": self.line(),
            "state": self.state,
            "strategies": [
                {"title": strategy.title, "settings": _settings(strategy), "off": strategy.is_off, "node": owner}
                | {"resting": self.resting.get(strategy, "")}
                for strategy, owner in zip_longest(self.strategies, self.owners)
            ],
            "steps": self.steps,
            "blocks": self.blocks,
            "totals": self._totals(calls),
            "measures": quantiles_of(calls),
            "advice": thresholds_to_try(calls),
            "why_nothing": (why := self._why_nothing(calls)),
            "warnings": warnings_of(calls, why, self.bytes_held, self.speed_up) if self._is_over(calls) else [],
            "notes": list(self.notes),
            "calls": [call.as_dict() for call in calls[first:]],
        }

    def _is_over(self, calls: list[CallRecord]) -> bool:
        return self.state != "running" or len({call.evaluation for call in calls}) >= self.steps

    def _why_nothing(self, calls: list[CallRecord]) -> str:
        """In words; "" where something was reused, or while the run is still going on."""
        if not self._is_over(calls):
            return ""
        is_off = all(strategy.is_off for strategy in self.strategies)
        return why_nothing(calls, [NEVER] if is_off else self.obstacles, self.notes)

    def _totals(self, calls: list[CallRecord]) -> dict[str, Any]:
        counts = {action: 0 for action in ACTIONS}
        branches: dict[str, dict[str, int]] = {}
        for call in calls:
            counts[call.action] += 1
            for branch in call.branches:
                branches.setdefault(branch, dict.fromkeys(ACTIONS, 0))[call.action] += 1
        return {
            "calls": len(calls),
            **counts,
            **steps_of(calls),
            "branches": dict(sorted(branches.items())),
            "computed_share": self.computed_share,
            "speed_up": (speed_up := self.speed_up),
            "seconds": self.seconds,
            "seconds_uncached": seconds_uncached(calls, self.seconds, speed_up),
            **{name: getattr(self, name) for name in KEPT},
            "gaps_repaired": self.gaps_repaired,
        }

    def line(self) -> str:
        """The run in one line, for the log."""
        names = " + ".join(strategy.title for strategy in self.strategies)
        parts = [f"{self.count(action)} {action}" for action in ACTIONS if self.count(action)]
        text = f"Refrain, {names}: {counted(len(self.calls), 'model call')}"
        text += f": {', '.join(parts)}" if parts else ""
        if self.count("reused", "forecast"):
            text += f"; {self.computed_share:.0%} of the {self.work} computed"
            text += f", {self.speed_up:.2f}x" if self.speed_up else ""
            text += f", {_held(self.bytes_held, self.bytes_foretold)} held"
            text += f" and {_held(self.bytes_away, self.bytes_foretold_away)} in main memory" if self.bytes_away else ""
            text += f", {counted(self.gaps_repaired, 'gap')} repaired" if self.gaps_repaired else ""
            text += f", gaps not repaired: {self.unrepaired}" if self.unrepaired else ""
        elif all(strategy.is_off for strategy in self.strategies):
            text += f"; {NEVER}"
        elif self.calls:
            why = "; ".join(self.obstacles) or self.calls[-1].reason or "; ".join(self.notes)
            text += f"; nothing reused: {why}"
        elif self.notes:
            text += f"; {'; '.join(self.notes)}"
        return text


def _held(held: int, foretold: int) -> str:
    return _amount(held) + f" of {_amount(foretold)} foretold" * (_amount(held) != _amount(foretold))


def _amount(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _settings(strategy: Strategy) -> dict[str, Any]:
    return {item.name: getattr(strategy, item.name) for item in fields(strategy) if item.metadata.get("shown")}
