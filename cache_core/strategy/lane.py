"""The way of tensors to main memory and back, beside what the model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HOST = torch.device("cpu")  # main memory
AWAY_SHARE = 0.5  # of what is free in main memory: pinned memory comes in powers of two
MOST_LEAVING = 2  # copies to main memory that the model does not wait for; what they copy from stays on the device


@dataclass(eq=False)
class Away:
    """Tensors that wait in main memory, and the way by which they come back."""

    parts: tuple[Tensor, ...]
    lane: Lane

    def back(self) -> tuple[Tensor, ...]:
        """Copies of them on their device, for the caller to keep."""
        return self.lane.back(self)


class Lane:
    """Copies tensors of one device to main memory and back; on CUDA in a stream of its own, through pinned memory.

    A copy begins when the model's stream has come as far as where it was asked for, and the model's stream waits for it
    only where its result is used, or its source's memory: both are referred to here until then. `record_stream` would
    also be right, but holds memory until the CPU sees that the copy is over. The CPU is many blocks ahead of the
    device, so by then all that was to leave would be on the device at once. Elsewhere copies are made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pins = self.stream is not None  # main memory, so that copies do not hold up the CPU
        self._leaving: deque[tuple[Sequence[Tensor], torch.cuda.Event | None]] = deque()
        self._arriving: dict[Away, tuple[tuple[Tensor, ...], torch.cuda.Event | None]] = {}

    def away(self, tensors: Sequence[Tensor]) -> Away:
        """These in main memory. They are given away."""
        waiting = tuple(map(self._room_for, tensors))
        self._leaving.append((tensors, self._copy(tensors, waiting)))
        while len(self._leaving) > MOST_LEAVING:
            self._wait_for(self._leaving.popleft()[1])
        return Away(waiting, self)

    def fetch(self, wanted: Iterable[Away]) -> None:
        """Begin to bring these back, ahead of use. What was fetched before and not used is dropped."""
        wanted = dict.fromkeys(wanted)
        for unused in [away for away in self._arriving if away not in wanted]:
            self._wait_for(self._arriving.pop(unused)[1])
        for away in wanted:
            if away not in self._arriving:
                self._arriving[away] = self._landing(away)

    def back(self, away: Away) -> tuple[Tensor, ...]:
        """See `Away.back`."""
        parts, event = self._arriving.pop(away, None) or self._landing(away)
        self._wait_for(event)
        return parts

    def close(self) -> None:
        """Nothing comes back any more: let the model's stream wait for all copies, and drop what they are made from."""
        for _, event in (*self._leaving, *self._arriving.values()):
            self._wait_for(event)
        self._leaving.clear()
        self._arriving.clear()

    def _room_for(self, tensor: Tensor) -> Tensor:
        if self.pins:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST, pin_memory=True)
            except RuntimeError:  # no more can be pinned: other memory is slower, and as good
                self.pins = False
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST)

    def _landing(self, away: Away) -> tuple[tuple[Tensor, ...], torch.cuda.Event | None]:
        parts = tuple(torch.empty(each.shape, dtype=each.dtype, device=self.device) for each in away.parts)
        return parts, self._copy(away.parts, parts)

    def _copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> torch.cuda.Event | None:
        if self.stream is None:
            for source, target in zip(sources, targets):
                target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # until sources are computed, targets free
        with torch.cuda.stream(self.stream):
            for source, target in zip(sources, targets):
                target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def _wait_for(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
