"""The latent's way through a sampling run: whether it goes on, and whether the sampler adds noise of its own.

A deterministic sampler makes the next latent of the latents and predictions it has had: a weighted sum of them,
whatever the method and its order. What is in no such sum is noise, or another picture. About a thousand values of each
tensor tell, on the CPU; they are read from the device together with the sigma.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Hashable
from math import nan

import numpy as np
import torch
from numpy.linalg import norm
from torch import Tensor

from .solvers import Weights

SAMPLES = 1024  # values of a latent that are looked at
REMEMBERED = 4  # predictions: the multistep methods in use combine up to four
LEAST_NOISE = 0.2  # of the move; measured: 0.25 to 0.9 where noise is added, else nothing but rounding
STANDSTILL = 1e-3  # of the latent's norm: a move below counts as this, or rounding would be all of it
ANOTHER = 0.4  # of the latent's norm: samplers that add a little noise at each step stay below
DOUBTFUL = 0.01  # likewise, where pictures or places are known to change: late in a run they resemble each other
ROUNDING = 1e-6  # relative: directions below are float32's last digits
SAME_STEP = 2e-6  # of the latents' norm: a solver's own step is met to a tenth of this, others are 100 times off


class LatentPath:
    """One latent's way, as far back as a sampler may look.

    What counts is whether noise is added, not whether the sampler could. `denoise_mask`, of the latent's shape, is 1
    where the sampler draws freely, and less where it is held to another picture (inpainting).
    """

    def __init__(self, denoise_mask: Tensor | None = None) -> None:
        self.has_noise = False  # whether the sampler was seen to add some
        self.noise_share = 0.0  # of the latent's last move: what is in no weighted sum of what was before
        self.novelty = 0.0  # the same as a share of the latent itself
        self.goes_on_from_before = False  # it continues the last latent but one: two pictures are sampled in turns
        self._mask = denoise_mask
        self.forget()

    def reaches(self, latent: Tensor) -> None:
        """The latent is here now. One of another shape begins its path anew."""
        if self._shape != latent.shape:
            self.forget()
            self._shape = latent.shape
        if len(self._unread) > 2 * REMEMBERED:
            self._unread.clear()  # nobody asks
        self._unread.append((True, self._thinned(latent)))

    def predicted(self, *predictions: Tensor) -> None:
        """The sampler was given these predictions for the latent, of its shape; it moves on along them."""
        fitting = (prediction for prediction in predictions if prediction.shape == self._shape)
        self._unread += [(False, self._thinned(prediction)) for prediction in fitting]

    @property
    def unread(self) -> list[Tensor]:
        """What is still on the device, float32, one axis each."""
        return [values for _, values in self._unread]

    def read(self, numbers: list[float], others: Collection[LatentPath] = ()) -> list[float]:
        """Those values have arrived on the CPU, first among these numbers. Returns the rest of them.

        `others` are paths that may lead along this one: with guidance, the latent moves along what both prompts give.
        """
        for is_latent, values in self._unread:
            arrived, numbers = np.array(numbers[: len(values)]), numbers[len(values) :]
            if is_latent:
                self._compare(arrived, [each for path in others if self._is_with(path) for each in path._predictions])
                self.latent, self.before = arrived, self.latent
            else:
                self._predictions.appendleft(arrived)
        self._unread.clear()
        return numbers

    def is_step_of(self, weights: Weights) -> bool:
        """Whether the last move is the one of a solver with these weights, to rounding."""
        if self.before is None or not self._predictions:
            return False
        expected = weights.latent * self.before + weights.denoised * self._predictions[0]
        if weights.earlier:
            if len(self._predictions) < 2:
                return False
            expected += weights.earlier * self._predictions[1]
        size = norm(self.before) + norm(self.latent)
        return bool(norm(self.latent - expected) <= SAME_STEP * size)  # NaN is not

    def notice_noise(self) -> bool:
        """Whether the sampler adds noise, seen just now."""
        is_new = self.noise_share > LEAST_NOISE and not self.has_noise
        self.has_noise |= is_new
        return is_new

    def forget(self) -> None:
        """Begin anew: let go of all tensors."""
        self._shape: torch.Size | None = None
        self._unread: list[tuple[bool, Tensor]] = []
        self.latent: np.ndarray | None = None  # the last one that was read, thinned
        self.before: np.ndarray | None = None  # the last but one
        self._predictions: deque[np.ndarray] = deque(maxlen=REMEMBERED)
        self.noise_share, self.novelty, self.goes_on_from_before = 0.0, 0.0, False

    def _is_with(self, other: LatentPath) -> bool:
        """Whether the other path was, or is, where this one is."""
        places = (other.latent, other.before)
        return other is not self and any(at is not None and np.array_equal(at, self.latent) for at in places)

    def _compare(self, latent: np.ndarray, predictions: list[np.ndarray]) -> None:
        self.noise_share, self.novelty, self.goes_on_from_before = 0.0, 0.0, False
        if self.latent is None:
            return
        directions = [*self._predictions, *predictions]
        before, rest = norm(self.latent), _unexplained(latent, [self.latent, *directions])
        self.noise_share = rest / (norm(latent - self.latent) + STANDSTILL * before) if before else nan
        self.novelty = rest / (norm(latent) or nan)
        if self.novelty > DOUBTFUL and self.before is not None:
            self.goes_on_from_before = _unexplained(latent, [self.before, *directions]) < rest / 2

    def _thinned(self, tensor: Tensor) -> Tensor:
        """About a thousand of its values, a copy; nothing where the latent is held to another picture."""
        values = _every_nth(tensor)
        if self._mask is None or self._mask.shape != tensor.shape:
            return values
        return values * (_every_nth(self._mask.to(tensor.device)) >= 1)


class Paths:
    """All paths of a run: of the sampler's latent, and of what each branch of a model call is asked about.

    They are followed only where a strategy needs it.
    """

    def __init__(self, whole: LatentPath, are_followed: bool) -> None:
        self.whole, self.of, self.are_followed = whole, dict[Hashable, LatentPath](), are_followed
        self.whole_is_followed = are_followed  # that of the sampler's latent; also where it is asked how it steps
        self.lock = threading.Lock()  # branches may run in threads: held while values are read

    @property
    def unread(self) -> list[Tensor]:
        """What is still on the device."""
        return [values for path in (self.whole, *self.of.values()) for values in path.unread]

    def read(self, numbers: list[float]) -> None:
        """That has arrived on the CPU."""
        numbers = self.whole.read(numbers)
        for path in self.of.values():
            numbers = path.read(numbers, self.of.values())

    def forget_all_but(self, contexts: Collection[Hashable]) -> None:
        """Drop the paths of other branches."""
        self.of = {context: path for context, path in self.of.items() if context in contexts}

    def forget(self) -> None:
        """Let go of everything."""
        self.whole.forget()
        self.of.clear()


def _unexplained(latent: np.ndarray, directions: list[np.ndarray]) -> float:
    """The norm of what is in no weighted sum of these; NaN where one holds what is no number."""
    span = np.stack(directions, 1)
    if not (np.isfinite(span).all() and np.isfinite(latent).all()):
        return nan
    span /= np.maximum(norm(span, axis=0), np.finfo(span.dtype).tiny)
    weights, *_ = np.linalg.lstsq(span, latent, rcond=ROUNDING)
    return norm(latent - span @ weights)


def _every_nth(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(flat.numel() // SAMPLES, 1) | 1].to(torch.float32, copy=True)
