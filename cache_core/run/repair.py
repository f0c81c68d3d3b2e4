"""Repair: where the latent should be after skipped steps, known once the next one is computed.

A sampler moves the latent x along slopes v = (x - D) / sigma, with D the prediction of the clean latent. In skipped
steps v is forecast from earlier ones. When a step is computed, the slopes before it are known better: they lie on the
line between this step's and that of the last computed one. With them the sampler's steps are made again, which tells
where the latent should be by now. What it should have moved differently is made up for in the prediction that the
sampler is given. No model call more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .solvers import SOLVERS, Solver, Step, Weights, euler


@dataclass
class Node:
    """A computed step as it should have been: float32, but for the prediction of the step before it."""

    sigma: float
    latent: Tensor
    slope: Tensor
    earlier: Tensor | None  # where the solver looks at it


class Fix(NamedTuple):
    """How far the latent is from where it should be, if at all, and what the sampler is to be given for it."""

    missed: Tensor | None
    denoised: Tensor


class Repair:
    """The computed steps and the gaps of one sampling run. Every value of the latent is repaired by itself.

    `mask` is 1 where the sampler draws freely: elsewhere nothing is repaired. Holds two latents in float32; where the
    solver looks at earlier predictions, up to three more. As long as it is not certain how the sampler steps, what is
    owed to the latent is made up for later, and is one more.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.solvers = SOLVERS  # by which all steps of the sampler so far could have been made
        self.stepped: Step | None = None  # its last, if it is known
        self._free = None if mask is None else mask >= 1
        self._given: Tensor | None = None  # what the sampler was given in the step before, if it may look at it again
        self.forget()

    def fits(self, latent: Tensor) -> bool:
        """Whether it is known where in a latent of this shape the sampler draws freely."""
        return self._free is None or self._free.shape == latent.shape

    def forget(self) -> None:
        """The slopes to come do not continue those before."""
        self._node: Node | None = None
        self._steps: list[Step] = []  # the node's own, and those skipped since
        self._owed: Tensor | None = None  # by how much the latent is not where it would be if it had been repaired
        self._earlier = self._given  # the prediction of the step before, as it should have been
        self.gaps = 0  # that were closed since, and are in it

    def know(self, was_step_of: Callable[[Weights], bool]) -> bool:
        """The sampler's last step is over: which solver's it may have been. Whether there is one left."""
        looked_back = self._looks_back
        if self.stepped is not None:
            self.solvers = tuple(solver for solver in self.solvers if was_step_of(solver(self.stepped)))
        if self.solvers and self._looks_back and not looked_back:
            self.forget()  # it was not Euler's after all
        return bool(self.solvers)

    def step(self, latent: Tensor, denoised: Tensor, sigma: float, following: float, is_computed: bool) -> Fix | None:
        """What to give the sampler in place of its prediction for this latent; None, nothing else.

        Its step is from one sigma to the following, by a prediction that was computed or was not.
        """
        self.stepped = step = Step(self.stepped.sigma if self.stepped else None, sigma, following)
        solver, is_certain = self.solvers[0], self._looks_back or len(self.solvers) == 1
        slope, missed, earlier = _slope(latent, denoised, sigma), self._owed, self._earlier
        if is_computed and self._node is not None and len(self._steps) > 1:
            again, earlier = _made_again(self._node, self._steps, solver, sigma, slope)
            missed, self.gaps = self._where_free(again.sub_(latent)), self.gaps + 1
        if missed is not None:
            slope.add_(missed, alpha=1 / sigma)
        weights = solver(step)
        if is_computed:
            place = latent.to(torch.float32, copy=True) if missed is None else latent + missed
            is_whole = not weights.earlier or earlier is not None
            self._node = Node(sigma, place, slope, earlier if weights.earlier else None) if is_whole else None
            self._steps = []
        self._steps.append(step)
        rest = self._rest(weights, missed, earlier)
        self._owed = rest if following and not is_certain else None
        may_look_back = self.solvers != (euler,)
        self._earlier = self._given = denoised if may_look_back else None
        if rest is None or not following or not is_certain:
            return None
        corrected = denoised.float().add(rest, alpha=1 / weights.denoised).to(denoised.dtype)
        self._given = corrected if may_look_back else None
        return Fix(missed, corrected)

    @property
    def bytes_held(self) -> int:
        """Of all tensors, once each."""
        of_node = (self._node.latent, self._node.slope, self._node.earlier) if self._node else ()
        tensors = (*of_node, self._owed, self._earlier, self._given)
        return sum({id(tensor): tensor.nbytes for tensor in tensors if tensor is not None}.values())

    @property
    def _looks_back(self) -> bool:
        """Whether it is certain that the solver does. Those that do hardly differ until they are told apart."""
        return self.solvers[0] is not euler

    def _rest(self, weights: Weights, missed: Tensor | None, earlier: Tensor | None) -> Tensor | None:
        """How far from where it should be the latent would be after a step by the prediction as it is."""
        rest = None if missed is None else missed * weights.latent
        if not weights.earlier or earlier is None or earlier is self._given:
            return rest
        behind = self._where_free(earlier.float() - self._given).mul_(weights.earlier)
        return behind if rest is None else rest.add_(behind)

    def _where_free(self, tensor: Tensor) -> Tensor:
        return tensor if self._free is None else tensor.mul_(self._free.to(tensor.device))


def _made_again(node: Node, steps: list[Step], solver: Solver, sigma: float, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The latent after these steps from the node on, and the prediction of the last of them.

    The slopes lie on the line from the node's to the one at this sigma.
    """
    latent, earlier = node.latent, node.earlier
    for step in steps:
        along, weights = (step.sigma - node.sigma) / (sigma - node.sigma), solver(step)
        denoised = torch.sub(latent, torch.lerp(node.slope, slope, along), alpha=step.sigma)
        following = (latent * weights.latent).add_(denoised, alpha=weights.denoised)
        if weights.earlier:
            following.add_(earlier, alpha=weights.earlier)
        latent, earlier = following, denoised
    return latent, earlier


def _slope(latent: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    return torch.sub(latent.float(), denoised.float()).div_(sigma)
