"""The procedural pictures of 128 x 128 pixels: one object or two, banded or spotted, on backgrounds with fine lines."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .scene import (
    COLORS,
    PATTERNS,
    PLACES,
    RADII,
    Pose,
    Uniform,
    chances,
    coverage,
    grid,
    ground,
    pixel_of,
    tinted,
    with_object,
)
from .shapes import OUTLINES

SIZE = 128  # pixels
FINISHES = ("", "banded", "spotted")
FINE_PATTERNS = ("lined", "tiled")
RADIUS_OF_TWO = 0.3  # of each of two objects; between scene.RADII's
FINENESS = 7.5  # of bands and spots
SHARE_WITH_TWO = 0.5  # of the pictures


class Thing(NamedTuple):
    """One object of a picture, in the words of its prompt; without a word for its size, and its finish, where empty."""

    size: str
    finish: str
    color: str
    shape: str
    place: str


class StillLife(NamedTuple):
    """What a picture shows. Of two things no word says the size or finish: the model hears eight words."""

    things: tuple[Thing, ...]  # the second before the first, where they meet
    background: str
    pattern: str


def random_still_life(chance: random.Random) -> StillLife:
    """One or two things; they and the background differ in colour, and two of them in place."""
    count = 2 if chance.random() < SHARE_WITH_TWO else 1
    *colors, background = chance.sample(list(COLORS), count + 1)
    places = chance.sample([place for place in PLACES if count == 1 or place != "center"], count)
    things = tuple(
        Thing(
            size=chance.choice(list(RADII)) if count == 1 else "",
            finish=chance.choice(FINISHES) if count == 1 else "",
            color=color,
            shape=chance.choice(list(OUTLINES)),
            place=place,
        )
        for color, place in zip(colors, places)
    )
    return StillLife(things, background, chance.choice(PATTERNS + FINE_PATTERNS))


def prompt_of(told: StillLife) -> str:
    """The prompt a picture was trained with.

    >>> prompt_of(StillLife((Thing("big", "banded", "red", "ball", "center"),), "blue", "lined"))
    'a big banded red ball at the center on a blue lined background'
    """
    things = " and ".join(
        "a {} at the {}".format(
            " ".join(filter(None, (thing.size, thing.finish, thing.color, thing.shape))), thing.place
        )
        for thing in told.things
    )
    return f"{things} on a {told.background} {told.pattern} background"


def render(told: Sequence[StillLife], size: int = SIZE, generator: torch.Generator | None = None) -> Tensor:
    """Pictures (batch, 3, size, size) in 0..1. Colours, places, angles and light vary a little from call to call."""
    uniform = chances(len(told), generator)
    x, y = grid(size)
    picture = ground([one.pattern for one in told], tinted([one.background for one in told], uniform), x, y, uniform)
    for number in range(2):
        there = [index for index, one in enumerate(told) if number < len(one.things)]
        if there:
            picture[there] = _with_things(
                picture[there], [told[index].things[number] for index in there], x, y, generator
            )
    return picture.clamp(0, 1)


def _with_things(
    picture: Tensor, things: Sequence[Thing], x: Tensor, y: Tensor, generator: torch.Generator | None
) -> Tensor:
    uniform = chances(len(things), generator)
    pose = _pose(things, uniform)
    color = _finished(things, tinted([thing.color for thing in things], uniform), pose, x, y)
    return with_object(picture, [thing.shape for thing in things], color, pose, x, y)


def _pose(things: Sequence[Thing], uniform: Uniform) -> Pose:
    places = torch.tensor([PLACES[thing.place] for thing in things])[:, :, None, None, None]
    radius = torch.tensor([RADII.get(thing.size, RADIUS_OF_TWO) for thing in things])[:, None, None, None]
    shifted = (places[:, axis] + uniform(-0.06, 0.06) for axis in (0, 1))
    return Pose(*shifted, radius * uniform(0.92, 1.08), uniform(-0.3, 0.3))


def _finished(things: Sequence[Thing], color: Tensor, pose: Pose, x: Tensor, y: Tensor) -> Tensor:
    """The colours (batch, 3, size, size) of the things' surfaces."""
    from_x, from_y, rate = x - pose.x, y - pose.y, FINENESS / pose.radius
    across = torch.sin(rate * (from_x * pose.angle.cos() + from_y * pose.angle.sin()))
    down = torch.sin(rate * (-from_x * pose.angle.sin() + from_y * pose.angle.cos()))
    heights = {"": torch.full_like(down, -torch.inf), "banded": down, "spotted": across * down - 0.2}
    height = torch.stack([heights[thing.finish][index] for index, thing in enumerate(things)])
    return color * (1 - 0.5 * coverage(-height / rate, pixel_of(x)))
