"""How much a run may hold, and where: on the device, in main memory, or not at all because it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from math import inf

import torch

from ..model.failures import give_back
from ..report.report import Report
from ..strategy.lane import Lane
from ..strategy.packed import AUTO, CPU, Kept, Packed, away, packed
from .memory import Memories, Memory, Place, away_in
from .ranks import Ranks
from .worth import is_fetched_faster

GIB = 2**30
MANY = ("attention", "block", "module")  # levels at which a strategy has one site of many
FIT = "{} of {} {}s fit in {:.3g} GiB{}; the others always run"
WAIT = "{} of {} {}s fit in {:.3g} GiB; {} wait in main memory"
REST = ", the others always run"


def _nobody_knows(device: torch.device) -> float | None:
    return None


@dataclass
class Budget:
    """Bytes are reserved for a branch at a site before anything is copied there, for as long as its memory lives.

    A strategy has its own limit, `memory_limit_gb`; where that is 0, all share what is free on the device when the run
    calls the model first. Each site holds all that it will hold, for every branch, or nothing. Where not all fit, those
    stay that save most work a byte; of equals, those that were met first. What is free is an estimate, so a strategy
    that works at one site only, and holds a few latents or streams there, may try.

    A site whose values do not fit on the device keeps them in main memory if the strategy's `cache_device` is `auto`,
    there is room, and it pays; if `cache_device` is `cpu`, all do, and the limit is of main memory.
    """

    free: Callable[[torch.device], float | None] = _nobody_knows  # bytes that may be held; None: nobody knows
    free_away: Callable[[torch.device], float | None] = _nobody_knows  # in main memory; None: there is no other
    left_out: set[Place] = field(default_factory=set)
    away: set[Place] = field(default_factory=set)  # whose values are in main memory
    is_agreed: bool = False  # ranks that share a call leave out the same sites from then on, and no others
    _found: dict[torch.device, float | None] = field(default_factory=dict)  # what was free
    _found_away: dict[torch.device, float | None] = field(default_factory=dict)
    _worth: dict[Place, float] = field(default_factory=dict)  # floating-point operations saved for each byte
    _may_leave: dict[Place, bool] = field(default_factory=dict)  # whether it pays, for those on the device
    _lanes: dict[torch.device, Lane] = field(default_factory=dict)
    _next: dict[Place, Place] = field(default_factory=dict)  # of those in `away`, in the model's order
    _ordered: int = 0  # of how many

    def look(self, device: torch.device) -> None:
        """See what is free, once: before the model's own work takes some of it for a while."""
        if device not in self._found:
            self._found[device], self._found_away[device] = self.free(device), self.free_away(device)

    def reserve(
        self, memories: Memories, place: Place, own: Sequence[Memory], wanted: Sequence[int], device: torch.device,
        work: Callable[[], float], one: Callable[[], int],
    ) -> bool:  # fmt: skip
        """Whether these branches may hold so many bytes at this place; if not, nothing is held at it any more.

        `work` tells how many floating-point operations each of them then saves, `one` of how many bytes one value is.
        """
        if place in memories.excluded:
            return False
        if all(memory.reserved >= count for memory, count in zip(own, wanted)):
            return True
        if place[0].cache_device == CPU and place[1].level != "guidance":
            self.away.add(place)
        for memory, count in zip(own, wanted):
            memory.reserved, memory.device, memory.is_away = count, device, place in self.away
        if place not in self._worth:
            self._worth[place] = work() / max(1, *wanted) if place[1].level in MANY else inf
        if place not in self._may_leave and place[0].cache_device == AUTO and place[1].level in MANY:
            is_known = self._found_away.get(device) is not None
            self._may_leave[place] = is_known and is_fetched_faster(max(wanted) + one(), work())
        while place not in self.left_out and (excess := self._excess(memories, place, device)) > 0:
            for least in self._least(memories, place, device, excess):
                if self._may_leave.get(least):
                    self._may_leave[least] = False
                    self.away.add(least)
                    memories.drop_but(least, own if least == place else ())
                else:
                    self.left_out.add(least)
                    memories.exclude(*least)
            for memory in own:
                memory.is_away = place in self.away
        return place not in self.left_out

    def agree(self, memories: Memories, ranks: Ranks) -> None:
        """Leave out what any rank leaves out, once all sites were met and before any is reused. A rank with a token
        more than others may hold less.
        """
        if self.is_agreed or ranks.group is None or not self._found:
            return
        self.is_agreed, device = True, next(iter(self._found))
        places = sorted({*memories.reserved_at(is_away=None), *self.left_out}, key=repr)
        if self._found[device] is None and not any(strategy.memory_limit_gb for strategy, _ in places):
            return
        are_alike = ranks.are_alike(places, device)
        left_out = ranks.largest([place in self.left_out for place in places] if are_alike else [], device)
        for place, is_left_out in zip_longest(places, left_out, fillvalue=1.0):
            if is_left_out and place not in self.left_out:
                self.left_out.add(place)
                memories.exclude(*place)

    def lane(self, device: torch.device) -> Lane:
        """The way from this device to main memory and back."""
        return self._lanes.get(device) or self._lanes.setdefault(device, Lane(device))

    def stored(self, tensor: Kept, dtype: torch.dtype | None, is_away: bool) -> Kept:
        """As it is kept, in this type, and where. The tensor is given away."""
        kept = packed(tensor, dtype)
        if not is_away:
            return kept
        return away(kept, self.lane((kept.parts[0] if isinstance(kept, Packed) else kept).device))

    def fetch_after(self, memories: Memories, place: Place, contexts: Sequence[Hashable]) -> None:
        """The values of this place came from main memory: let those of the next one in the model come too."""
        if self._ordered != len(self.away):
            self._next = dict(pairwise(memories.reserved_at(is_away=True)))
            self._ordered = len(self.away)
        following = self._next.get(place)
        kept = [memories.get((context, *following)) for context in contexts] if following else []
        wanted = away_in([memory.state for memory in kept if memory is not None])
        if wanted:
            wanted[0].lane.fetch(wanted)

    def close_lanes(self) -> None:
        """Nothing is held any more."""
        for lane in self._lanes.values():
            lane.close()

    def give_back(self) -> None:
        """Let the devices have the memory that PyTorch keeps there for later."""
        for device in self._found:
            give_back(device)

    def tell(self, memories: Memories, report: Report) -> None:
        """Say which sites fit on the device, or where all go in main memory there, if not all did."""
        split = {place for place in self.away if place[0].cache_device == AUTO}
        for strategy in dict.fromkeys(strategy for strategy, _ in (*self.left_out, *split)):
            out = {place for place in self.left_out if place[0] is strategy}
            waiting = split.intersection(memories.reserved_at(strategy, is_away=True))
            if not out | waiting:
                continue
            level = next(iter(out | waiting))[1].level
            fit = {place for place in memories.reserved_at(strategy, is_away=None) if place[1].level == level} - waiting
            limit, where = strategy.memory_limit_gb, " (memory_limit_gb)"
            if not limit:
                found = self._found_away if strategy.cache_device == CPU else self._found
                limit, where = min(filter(None, found.values()), default=0) / GIB, ", which is what was free"
            what = level.replace("output", "output of the model")
            counts = len(fit), len(fit | waiting | out), what, limit
            said = WAIT.format(*counts, len(waiting)) + REST * bool(out) if waiting else FIT.format(*counts, where)
            report.note(f"{strategy.title}: {said}")

    def _least(self, memories: Memories, place: Place, device: torch.device, excess: float) -> list[Place]:
        """What has to go, as so many bytes are too many: what saves least work a byte, or else this place itself.

        Of those that save less than it does the most valuable stay, as far as they fit.
        """
        reserved = memories.reserved_at(place[0], device, place in self.away)
        lesser = {other: count for other, count in reserved.items() if self._worth[other] < self._worth[place]}
        room = sum(lesser.values()) - excess
        if room < 0 or self._may_leave.get(place):
            return [place]
        least = []
        for other in sorted(lesser, key=self._worth.__getitem__, reverse=True):
            if lesser[other] <= room:
                room -= lesser[other]
            else:
                least.append(other)
        return least

    def _excess(self, memories: Memories, place: Place, device: torch.device) -> float:
        """How many bytes too many are reserved where this place keeps its own."""
        if self.is_agreed:
            return 0
        strategy, is_away = place[0], place in self.away
        own = strategy.memory_limit_gb * GIB if is_away == (strategy.cache_device == CPU) else 0
        if own:
            return memories.bytes_reserved(strategy, is_away=is_away) - own
        free = (self._found_away if is_away else self._found).get(device)
        if free is None or place[1].level not in MANY:
            return 0
        return memories.bytes_reserved(device=None if is_away else device, is_away=is_away) - free
