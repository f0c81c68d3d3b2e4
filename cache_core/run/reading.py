"""A sigma on the device, and when it is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..strategy.step import Schedule, Step


class SigmaReading:
    """A sigma on the device, and its value once that has been read, or where it is known already.

    What else there is to know of the evaluation, `noise_share` of the latent's move, is read in the same transfer.
    """

    def __init__(self, sigma: Tensor, value: float | None = None, noise_share: Tensor | None = None) -> None:
        self.tensor = sigma.detach().to(torch.float32).max()
        self._value, self._beside = value, () if noise_share is None else (noise_share,)
        self._noise_share = 0.0

    @property
    def value(self) -> float:
        """Waits for the device the first time."""
        if self._value is None:
            self._read()
        return self._value

    @property
    def noise_share(self) -> float:
        """Of the latent's move; 0 where nothing is known of it. Waits for the device the first time."""
        if self._value is None:
            self._read()
        return self._noise_share

    @property
    def is_ready(self) -> bool:
        """Whether reading the value would not wait for the device."""
        return self._value is not None or self.tensor.device.type == "cpu"

    def read_with(self, other: Tensor) -> float:
        """Another number's value; the sigma is read in the same transfer."""
        return other.item() if self._value is not None else self._read(other)[0]

    def _read(self, *others: Tensor) -> list[float]:
        numbers = (self.tensor, *self._beside, *others)
        self._value, *rest = torch.stack([number.to(self.tensor) for number in numbers]).tolist()
        if self._beside:
            self._noise_share = rest.pop(0)
        return rest


@dataclass(frozen=True)
class StepOfCall:
    """Reads where in the schedule a model call was."""

    schedule: Schedule
    sigma: SigmaReading

    @property
    def is_ready(self) -> bool:
        return self.sigma.is_ready

    def __call__(self) -> Step:
        return self.schedule.step_at(self.sigma.value)
