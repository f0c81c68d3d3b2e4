"""Solvers whose step is a weighted sum of the latent, the prediction for it, and the prediction before.

Most samplers in use without noise are among them. Each is a function of three sigmas that gives these weights, so a
step can be told by them, and made again with better predictions. Sources: Euler's method as in Karras et al.,
arXiv 2206.00364; DPM-Solver++(2M), arXiv 2211.01095; the multistep method of RES, arXiv 2308.02157.
"""

from __future__ import annotations

from collections.abc import Callable
from math import expm1, log
from typing import NamedTuple


class Step(NamedTuple):
    """From where to where a sampler stepped: sigmas, falling. The first step of a run has none before."""

    before: float | None
    sigma: float
    following: float


class Weights(NamedTuple):
    """Of the next latent, which is their sum. `earlier` is of the prediction before; None: it is never looked at."""

    latent: float
    denoised: float
    earlier: float | None


Solver = Callable[[Step], Weights]


def euler(step: Step) -> Weights:
    """x + (following - sigma) (x - D) / sigma."""
    left = step.following / step.sigma
    return Weights(left, 1 - left, None)


def dpmpp_2m(step: Step) -> Weights:
    """DPM-Solver++(2M): along the line through both predictions, by its value half of a step further."""
    left = step.following / step.sigma
    if step.before is None or not step.following:
        return Weights(left, 1 - left, 0.0)
    ahead = (1 - left) * _length(step) / (2 * log(step.before / step.sigma))
    return Weights(left, 1 - left + ahead, -ahead)


def res_multistep(step: Step) -> Weights:
    """RES, second order: along the same line, integrated exactly."""
    left = step.following / step.sigma
    if step.before is None or not step.following:
        return Weights(left, 1 - left, 0.0)
    length = _length(step)
    ahead = (length + expm1(-length)) / log(step.before / step.sigma)
    return Weights(left, 1 - left + ahead, -ahead)


SOLVERS: tuple[Solver, ...] = (euler, dpmpp_2m, res_multistep)


def _length(step: Step) -> float:
    """In the logarithm of sigma."""
    return log(step.sigma / step.following)
