"""A sigma on the device, and when it is read."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ..strategy import Schedule, Step


class SigmaReading:
    """A sigma on the device; its value, and the step it belongs to, once that has been read or where it is known.

    What else there is to know of the evaluation, the noise's share of the latent's move, is read in the same transfer.
    """

    def __init__(
        self, sigma: Tensor, schedule: Schedule, value: float | None = None, noise_share: Tensor | None = None
    ) -> None:
        self.tensor, self.schedule = sigma.detach().to(torch.float32).max(), schedule
        self._value, self._also_read = value, () if noise_share is None else (noise_share,)
        self.may_show_noise = noise_share is not None
        self._noise_share = 0.0

    @property
    def value(self) -> float:
        """Waits for the device the first time."""
        if self._value is None:
            self._read()
        return self._value

    @cached_property
    def step(self) -> Step:
        """Where in the schedule it is. Waits for the device the first time."""
        return self.schedule.step_at(self.value)

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

    def measured(self, measure: Callable[[Tensor], Tensor]) -> float:
        """The number that `measure(time)` gives; the sigma is read in the same transfer."""
        number = measure(self.schedule.time_of(self.tensor))
        return number.item() if self._value is not None else self._read(number)[0]

    def _read(self, *others: Tensor) -> list[float]:
        numbers = (self.tensor, *self._also_read, *others)
        self._value, *rest = torch.stack([number.to(self.tensor) for number in numbers]).tolist()
        if self._also_read:
            self._noise_share = rest.pop(0)
        return rest
