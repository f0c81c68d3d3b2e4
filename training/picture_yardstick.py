"""What a picture of one or two objects shows, read off its pixels as of a video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cache_core.demo.scene import COLORS as RGB
from cache_core.demo.scene import grid
from cache_core.demo.shapes import OUTLINES
from cache_core.demo.still_life import StillLife

from .yardstick import alike, brought_to_the_middle, ground_and_objects, hues, middles, nearest_place, share_of

COLORS, SHAPES = tuple(RGB), tuple(OUTLINES)
REACH = 0.5  # of an object from where its hue is most crowded: further off, it is a gloss of another one
LEAST = 0.2  # of the pixels of the larger object: what is less is a gloss


class SeenThing(NamedTuple):
    """One object of a picture."""

    color: str
    shape: str
    place: str


NOTHING = SeenThing("", "", "")


def seen_in(picture: Tensor) -> tuple[str, list[SeenThing]]:
    """The background's colour, and the one or two objects, of a picture (3, size, size) in 0..1."""
    found = hues(picture[None], COLORS)
    ground, inside = ground_and_objects(found)
    counts = found[inside].bincount(minlength=len(COLORS))
    largest = [hue for hue in counts.argsort(descending=True)[:2].tolist() if counts[hue] > LEAST * counts.max()]
    things = (_thing(COLORS[hue], COLORS[ground], picture, found == hue) for hue in largest)
    return COLORS[ground], [thing for thing in things if thing is not NOTHING]


def share_right(pictures: Sequence[Tensor], told: Sequence[StillLife]) -> dict[str, float]:
    """Of each word of the objects, and of the backgrounds, the share that is as told; "all": of whole pictures."""
    right: dict[str, list[bool]] = {part: [] for part in (*SeenThing._fields, "background", "all")}
    for picture, one in zip(pictures, told, strict=True):
        background, things = seen_in(picture)
        wanted = [SeenThing(thing.color, thing.shape, thing.place) for thing in one.things]
        for thing in wanted:
            closest = max(things, key=lambda seen: sum(map(str.__eq__, seen, thing)), default=NOTHING)
            for part, is_right in zip(SeenThing._fields, map(str.__eq__, closest, thing)):
                right[part].append(is_right)
        right["background"].append(background == one.background)
        right["all"].append(background == one.background and sorted(things) == sorted(wanted))
    return {part: sum(values) / len(values) for part, values in right.items()}


def _thing(color: str, background: str, picture: Tensor, has_its_hue: Tensor) -> SeenThing:
    near = functional.max_pool2d(has_its_hue.float(), 5, stride=1, padding=2)
    crowded = functional.avg_pool2d(has_its_hue.float(), 25, stride=1, padding=12)
    x, y = grid(picture.shape[-1])
    at = crowded.argmax()
    here = torch.hypot(x - x.flatten()[at], y - y.flatten()[at]) < REACH
    mask = share_of(color, background, picture[None]) * near * here
    if mask.sum() < 4:  # pixels
        return NOTHING
    x, y, radius = middles(mask)
    shape = alike(brought_to_the_middle(mask, x, y, radius), SHAPES).amax(2)[0].argmax()
    return SeenThing(color, SHAPES[shape], nearest_place(x, y))
