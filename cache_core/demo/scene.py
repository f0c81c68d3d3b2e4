"""The procedural pictures the demo was trained on: one shaded object with its shadow on a patterned background."""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import OUTLINES

COLORS = {
    "red": (0.86, 0.13, 0.12),
    "orange": (0.95, 0.52, 0.10),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.16, 0.62, 0.22),
    "cyan": (0.15, 0.75, 0.80),
    "blue": (0.13, 0.28, 0.85),
    "purple": (0.52, 0.18, 0.70),
    "white": (0.93, 0.93, 0.93),
}
RADII = {"small": 0.26, "big": 0.46}  # the picture spans -1..1 in x (to the right) and y (downward)
PLACES = {"left": (-0.42, 0.0), "right": (0.42, 0.0), "top": (0.0, -0.42), "bottom": (0.0, 0.42), "center": (0.0, 0.0)}
PATTERNS = ("plain", "striped", "checkered", "dotted", "wavy")

Uniform = Callable[..., Tensor]  # (low, high, channels=...) -> one random number per picture (and channel)


class Scene(NamedTuple):
    """What a picture shows, in the words of its prompt."""

    size: str
    color: str
    shape: str
    place: str
    background: str
    pattern: str


class Pose(NamedTuple):
    """Where an object is in each picture, how large and how turned; each (batch, 1, 1, 1)."""

    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor


def random_scene(generator: random.Random) -> Scene:
    """One of the 22,400 scenes, each as likely as the others; object and background differ in colour."""
    color, background = generator.sample(list(COLORS), 2)
    return Scene(
        size=generator.choice(list(RADII)),
        color=color,
        shape=generator.choice(list(OUTLINES)),
        place=generator.choice(list(PLACES)),
        background=background,
        pattern=generator.choice(PATTERNS),
    )


def prompt_of(scene: Scene) -> str:
    """The prompt a scene was trained with.

    >>> prompt_of(Scene("big", "red", "ball", "center", "blue", "striped"))
    'a big red ball at the center on a blue striped background'
    """
    return "a {} {} {} at the {} on a {} {} background".format(*scene)


def render(scenes: Sequence[Scene], size: int = 64, generator: torch.Generator | None = None) -> Tensor:
    """Pictures (batch, 3, size, size) in 0..1. Colours, places, angles and light vary a little from call to call."""
    uniform = chances(len(scenes), generator)
    x, y = grid(size)
    color = tinted([scene.color for scene in scenes], uniform)
    background = tinted([scene.background for scene in scenes], uniform)
    picture = ground([scene.pattern for scene in scenes], background, x, y, uniform)
    pose = _pose(scenes, uniform)
    return with_object(picture, [scene.shape for scene in scenes], color, pose, x, y).clamp(0, 1)


def chances(count: int, generator: torch.Generator | None) -> Uniform:
    """Makes random numbers (count, channels, 1, 1) between two bounds."""

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)

    return uniform


def grid(size: int) -> tuple[Tensor, Tensor]:
    """x and y, (size, size) each, of the pixels of a picture."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def tinted(names: Sequence[str], uniform: Uniform) -> Tensor:
    """Colours (batch, 3, 1, 1) close to those of these names."""
    colors = torch.tensor([COLORS[name] for name in names])[:, :, None, None]  # (batch, 3, 1, 1)
    return (colors + uniform(-0.04, 0.04, channels=3)).clamp(0, 1)


def ground(patterns: Sequence[str], color: Tensor, x: Tensor, y: Tensor, uniform: Uniform) -> Tensor:
    """Backgrounds (batch, 3, size, size) of these patterns and colours."""
    angle = uniform(-0.25, 0.25) + math.pi / 4 * (uniform(0, 1) > 0.5)
    phase, frequency = uniform(0, 2 * math.pi), uniform(2.2, 3.2)
    along, across = x * angle.cos() + y * angle.sin(), -x * angle.sin() + y * angle.cos()
    rate = math.pi * frequency
    waves, cross_waves = torch.sin(rate * along + phase), torch.sin(rate * across + phase)
    heights = {
        "plain": torch.full_like(waves, -torch.inf),
        "striped": waves,
        "checkered": waves * cross_waves,
        "dotted": waves * cross_waves - 0.45,
        "wavy": torch.sin(rate * (y + 0.12 * torch.sin(4 * x + phase)) + 2 * phase),
        "lined": waves.abs() - 0.9,
        "tiled": torch.maximum(waves.abs(), cross_waves.abs()) - 0.9,
    }
    height = torch.stack([heights[pattern][index] for index, pattern in enumerate(patterns)])
    darkness = 0.45 * coverage(-height / rate, pixel_of(x))
    light_x, light_y = uniform(-0.3, 0.3), uniform(-0.9, -0.5)
    light = 1.08 - 0.22 / 1.2 * torch.hypot(x - light_x, y - light_y).clamp(max=2)
    return color * (1 - darkness) * light


def _pose(scenes: Sequence[Scene], uniform: Uniform) -> Pose:
    places = torch.tensor([PLACES[scene.place] for scene in scenes])[:, :, None, None, None]
    radius = torch.tensor([RADII[scene.size] for scene in scenes])[:, None, None, None] * uniform(0.92, 1.08)
    return Pose(places[:, 0] + uniform(-0.06, 0.06), places[:, 1] + uniform(-0.06, 0.06), radius, uniform(-0.3, 0.3))


def with_object(picture: Tensor, shapes: Sequence[str], color: Tensor, pose: Pose, x: Tensor, y: Tensor) -> Tensor:
    """The pictures with an object of these shapes, and with its shadow, drawn into them."""
    radius, angle = pose.radius, pose.angle
    x, y = x - pose.x, y - pose.y

    def outline(x: Tensor, y: Tensor) -> Tensor:
        turned_x, turned_y = x * angle.cos() + y * angle.sin(), -x * angle.sin() + y * angle.cos()
        parts = zip(shapes, turned_x, turned_y, radius, strict=True)
        return torch.stack([OUTLINES[shape](*part) for shape, *part in parts])

    shadow = torch.sigmoid(-outline(x - 0.05, y - 0.07) / 0.035)  # to the lower right, soft
    distance = outline(x, y)
    covered = coverage(distance, pixel_of(x))
    rim = (1 + distance / (0.16 * radius)).clamp(0, 1)
    lit = 1.05 - 0.55 / 1.3 * torch.hypot(x / radius + 0.45, y / radius + 0.45).clamp(max=2)
    gloss = 0.55 * torch.exp(-((x / radius + 0.32).square() + (y / radius + 0.38).square()) / 0.035)
    surface = color * lit * (1 - 0.35 * rim.square()) + gloss * (0.3 * color + 0.7)
    return torch.lerp(picture * (1 - 0.45 * shadow), surface, covered)


def coverage(distance: Tensor, pixel: float) -> Tensor:
    """How much of a pixel lies inside an outline: 0 to 1 over about one pixel, so that edges are smooth."""
    return torch.sigmoid(-distance / (0.6 * pixel))


def pixel_of(x: Tensor) -> float:
    return 2 / x.shape[-1]
