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
    """Of the next latent, which is their sum. `earlier` is of the prediction before."""

    latent: float
    denoised: float
    earlier: float


Solver = Callable[[Step], Weights]


def euler(step: Step) -> Weights:
    """x + (following - sigma) (x - D) / sigma."""
    left = step.following / step.sigma
    return Weights(left, 1 - left, 0.0)


def dpmpp_2m(step: Step) -> Weights:
    """DPM-Solver++(2M): along the line through both predictions, by its value half of a step further."""
    return _along_a_line(step, lambda length: -expm1(-length) * length / 2)


def res_multistep(step: Step) -> Weights:
    """RES, second order: along the same line, integrated exactly."""
    return _along_a_line(step, lambda length: length + expm1(-length))


SOLVERS: tuple[Solver, ...] = (euler, dpmpp_2m, res_multistep)


def _along_a_line(step: Step, ahead_in: Callable[[float], float]) -> Weights:
    """Euler's, and how far ahead of the prediction the line is followed, for a length in the logarithm of sigma.

    There is no line in the first step, and none is followed in the last.
    """
    plain = euler(step)
    if step.before is None or not step.following:
        return plain
    ahead = ahead_in(log(step.sigma / step.following)) / log(step.before / step.sigma)
    return Weights(plain.latent, plain.denoised + ahead, -ahead)
