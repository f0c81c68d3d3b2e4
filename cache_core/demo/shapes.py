"""The outlines of the demo's objects, as distances: negative inside, positive outside, about 0 on the edge.

Each takes x to the right and y downward from the object's centre, and its radius, in any shapes that broadcast.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Outline = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ball(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.hypot(x, y) - radius


def _cube(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.82 * radius


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(y - 0.55 * radius, (x.abs() * math.sqrt(3) - y) / 2 - 0.55 * radius)


def _star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    fifth = 2 * math.pi / 5
    angle = (torch.atan2(x, -y) + fifth / 2) % fifth - fifth / 2  # fold the five points onto the upper one
    distance = torch.hypot(x, y)
    along, across = distance * torch.cos(angle), distance * torch.sin(angle).abs()
    return (along - 1.1 * radius) * 0.588 + across * 0.809  # sin and cos of 36 degrees: the slope of a point's side


def _heart(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    x, y = x / (1.05 * radius), -y / (1.05 * radius) + 0.15
    lobes = y - 0.72 * x.abs().clamp_min(1e-4).pow(0.75)  # 1e-4: the power has an infinite slope at 0
    return ((x.square() + lobes.square()).sqrt() - 0.9) * radius


def _ring(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.78 * radius).abs() - 0.24 * radius


def _cross(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    horizontal = torch.maximum(x - radius, y - 0.33 * radius)
    vertical = torch.maximum(y - radius, x - 0.33 * radius)
    return torch.minimum(horizontal, vertical)


def _moon(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    bite = torch.hypot(x - 0.5 * radius, y + 0.15 * radius)
    return torch.maximum(torch.hypot(x, y) - radius, 0.85 * radius - bite)


OUTLINES: dict[str, Outline] = {
    "ball": _ball,
    "cube": _cube,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "moon": _moon,
}
