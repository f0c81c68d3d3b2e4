"""Repair: how the latent should have moved over skipped steps, known once the next one is computed.

Euler's method moves the latent along a slope, v = (x - D) / sigma, with D the prediction of the clean latent. In
skipped steps v is forecast from earlier ones. When a step is computed, the slopes before it are known better: they lie
on the line between this step's and that of the last computed one. What the latent should have moved differently is made
up for in the prediction that the sampler is given. No model call more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Gap:
    """Reused steps since the last computed one. Sums over them, with h the (negative) length of a step in sigma."""

    moved: Tensor  # of h v: how far the latent was moved
    length: float = 0.0  # of h
    moment: float = 0.0  # of h sigma


@dataclass
class Node:
    """A computed step: its sigma, and its slope as if it had been evaluated at the repaired latent."""

    sigma: float
    slope: Tensor


class Repair:
    """The slopes and moves of one sampling run, in float32. Every value of the latent is repaired by itself.

    `mask` is 1 where the sampler draws freely: elsewhere nothing is repaired. Holds two latents, and a third one as
    long as it is not known whether the run may be repaired: what is then owed to the latent is made up for later.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self._free = None if mask is None else mask >= 1
        self.forget()

    def fits(self, latent: Tensor) -> bool:
        """Whether it is known where in a latent of this shape the sampler draws freely."""
        return self._free is None or self._free.shape == latent.shape

    def forget(self) -> None:
        """The slopes to come do not continue those before."""
        self._node: Node | None = None
        self._gap: Gap | None = None
        self._owed: Tensor | None = None  # by how much the latent is not where it would be if it had been repaired
        self.gaps = 0  # that were closed since, and are in it

    def step(
        self, latent: Tensor, denoised: Tensor, sigma: float, following: float, is_computed: bool, may_repair: bool
    ) -> Tensor | None:
        """How far to move the latent before the sampler steps on; None, not at all.

        Its step is from one sigma to the following, by a prediction that was computed or was not.
        """
        slope, fix = _slope(latent, denoised, sigma), self._owed
        if is_computed and self._node is not None and self._gap is not None:
            missed = _missed(self._gap, self._node, sigma, slope)
            missed = missed if self._free is None else missed.mul_(self._free.to(missed.device))
            fix, self._gap, self.gaps = missed if fix is None else missed.add_(fix), None, self.gaps + 1
        if fix is not None:
            slope.add_(fix, alpha=1 / sigma)
        if is_computed:
            self._node = Node(sigma, slope)
        elif self._node is not None:
            self._gap = _longer(self._gap, slope, sigma, following - sigma)
        self._owed = None if fix is None or may_repair else fix * (following / sigma)
        return fix if may_repair and following > 0 else None

    @property
    def bytes_held(self) -> int:
        """Of both latents, also while there is no gap."""
        return 0 if self._node is None else 2 * self._node.slope.nbytes


def with_fix(denoised: Tensor, fix: Tensor, sigma: float, following: float) -> Tensor:
    """The prediction by which Euler's step leads to where it would if the latent were moved and the prediction stood.

    So late in the run little of the fix is left, and nothing in the last step.
    """
    return denoised.float().add(fix, alpha=following / (sigma - following)).to(denoised.dtype)


def _longer(gap: Gap | None, slope: Tensor, sigma: float, length: float) -> Gap:
    """One reused step more. Takes the slope's tensor, or adds to the gap's."""
    if gap is None:
        return Gap(slope.mul_(length), length, length * sigma)
    return Gap(gap.moved.add_(slope, alpha=length), gap.length + length, gap.moment + length * sigma)


def _missed(gap: Gap, node: Node, sigma: float, slope: Tensor) -> Tensor:
    """The move along the line between both slopes, less the one that was made. Takes the gap's tensor."""
    along = (gap.moment - gap.length * node.sigma) / (sigma - node.sigma)
    return gap.moved.neg_().add_(node.slope, alpha=gap.length - along).add_(slope, alpha=along)


def _slope(latent: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    return torch.sub(latent.float(), denoised.float()).div_(sigma)
