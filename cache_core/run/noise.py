"""Whether a sampler adds noise of its own between the steps."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

REMEMBERED = 4  # predictions: the multistep methods in use combine up to four
LEAST_NOISE = 0.2  # of the move; measured: 0.25 to 0.9 where noise is added, else nothing but rounding
STANDSTILL = 1e-3  # of the latent's norm: a move below counts as this, or rounding would be all of it
NOTHING_NEW = 1e-4  # of its norm: what is left of a tensor that lies in the span of others, in float32


class LatentPath:
    """The latent's way through a sampling run, as far back as a sampler may look.

    A deterministic sampler makes the next latent of the latents and predictions it has had: a weighted sum of them,
    whatever the method and its order. Noise is in no such sum. That is seen without knowing the sampler, and what
    counts is whether noise is added, not whether the sampler could. `denoise_mask`, of the latent's shape, is 1 where
    the sampler draws freely, and less where it is held to another picture (inpainting).
    """

    def __init__(self, denoise_mask: Tensor | None = None) -> None:
        self.has_noise = False  # whether the sampler was seen to add some
        self._is_free = None if denoise_mask is None else denoise_mask >= 1
        self._latent: Tensor | None = None
        self._predictions: deque[Tensor] = deque(maxlen=REMEMBERED)
        self._lock = threading.Lock()  # branches may run in threads

    def noise_share(self, latent: Tensor) -> Tensor | None:
        """The share of the latent's last move that is in no weighted sum, a scalar on the device. None at the start."""
        if self.has_noise or self._latent is None:
            return None
        rest = self._flat(latent)
        move = (rest - self._latent).norm()
        span = _orthonormal([self._latent, *self._predictions])
        for _ in range(2):  # once more takes away what rounding left
            rest = rest - (span @ rest) @ span
        return rest.norm() / (move + STANDSTILL * self._latent.norm())

    def goes_on(self, latent: Tensor, prediction: Tensor) -> None:
        """The sampler was given this prediction of the clean latent for this latent."""
        if not self.has_noise:
            self._latent = self._flat(latent)
            self._predictions.appendleft(self._flat(prediction))

    def notice(self, noise_share: float) -> bool:
        """Whether the sampler adds noise, seen just now by this share of the latent's last move."""
        with self._lock:
            is_new = noise_share > LEAST_NOISE and not self.has_noise
            if is_new:
                self.has_noise = True
                self.forget()
            return is_new

    def forget(self) -> None:
        """Let go of all tensors."""
        self._is_free = self._latent = None
        self._predictions.clear()

    def _flat(self, tensor: Tensor) -> Tensor:
        free = 1.0 if self._is_free is None else self._is_free.to(tensor.device)
        return (tensor.detach().float() * free).flatten()


def _orthonormal(vectors: list[Tensor]) -> Tensor:
    """Vectors of unit length, (vectors, elements), with the same span; zeros for those that add nothing to it."""
    span = torch.zeros(len(vectors), vectors[0].numel(), device=vectors[0].device)
    for index, vector in enumerate(vectors):
        rest = vector / vector.norm()
        for _ in range(2):
            rest = rest - (span[:index] @ rest) @ span[:index]
        length = rest.norm()
        span[index] = torch.where(length > NOTHING_NEW, rest / length, 0.0)
    return span
