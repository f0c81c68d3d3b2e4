"""A sigma on the device, and when it is read."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor

from ..strategy import Schedule, Step
from .path import Paths


class AnotherStep(Exception):
    """The model is told another step than was supposed."""


def largest(sigma: Tensor) -> Tensor:
    """One for all, of sigmas or timesteps that may be one for each row or token. A scalar in float32."""
    return sigma.detach().to(torch.float32).max()


class SigmaReading:
    """A sigma on the device; its value, and the step it belongs to, once that has been read or where it is known.

    What else is to be read, of the latent's `paths`, comes in the same transfer.
    """

    def __init__(
        self, sigma: Tensor, schedule: Schedule, paths: Paths | None = None, value: float | None = None
    ) -> None:
        self.tensor, self.schedule = largest(sigma), schedule
        self._value, self._paths = value, paths if paths is not None and paths.whole_is_followed else None
        self._told: list[tuple[Tensor, Callable[[float], bool]]] = []

    @property
    def value(self) -> float:
        """Waits for the device the first time."""
        if self._value is None:
            self.read()
        return self._value

    @cached_property
    def step(self) -> Step:
        """Where in the schedule it is. Waits for the device the first time."""
        return self.schedule.step_at(self.value)

    @property
    def is_read(self) -> bool:
        """Whether the value is known."""
        return self._value is not None

    @property
    def is_ready(self) -> bool:
        """Whether reading the value would not wait for the device."""
        return self._value is not None or (self.tensor.device.type == "cpu" and not self._told)

    def suppose(self, told: Tensor, is_right: Callable[[float], bool]) -> None:
        """The value is only supposed: with the next that is read, see whether what the model is told says so too."""
        self._told = [(largest(told), is_right)]

    def settle(self) -> Step:
        """See it now, if nothing was read meanwhile. The step is known from then on, whichever the schedule is at."""
        if self._told:
            self.read()
        return self.step

    def measured(self, measure: Callable[[Tensor], Tensor]) -> float:
        """The number that `measure(time)` gives; the sigma is read in the same transfer."""
        return self.read(measure(self.schedule.time_of(self.tensor)))[0]

    def read(self, *numbers: Tensor) -> list[float]:
        """These numbers, scalars on the device. What else is unread comes in the same transfer.

        Raises AnotherStep if the value was supposed, and not rightly.
        """
        paths, told = self._paths, self._told
        with paths.lock if paths else nullcontext():
            sigma = [self.tensor] if self._value is None else []
            wanted = [*sigma, *(tensor for tensor, _ in told), *numbers, *(paths.unread if paths else ())]
            arrived = torch.cat([each.to(self.tensor).reshape(-1) for each in wanted]).tolist() if wanted else []
            if sigma:
                self._value = arrived.pop(0)
            self._told = []
            for _, is_right in told:
                if not is_right(arrived.pop(0)):
                    raise AnotherStep
            if paths:
                paths.read(arrived[len(numbers) :])
        return arrived[: len(numbers)]
