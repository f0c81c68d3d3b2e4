"""What a video shows, read off its pixels: object and background by hue, the shape by comparing with drawn outlines.

Nothing is trained, and the prompt is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cache_core.demo.motion import COLORS, MOTIONS, SHAPES, SPEEDS, UNIT, Clip, Rates
from cache_core.demo.scene import COLORS as RGB
from cache_core.demo.scene import PLACES, grid
from cache_core.demo.shapes import OUTLINES

SIDE = 32  # pixels of an outline, brought to one place and size
ANGLES = 90  # a drawn outline every 4 degrees
SEEN_FROM = 0.5  # as fast as this, in units of "slowly", something moves; slower, it stands
FASTER_FROM = math.sqrt(SPEEDS["slowly"] * SPEEDS["quickly"])


class Seen(NamedTuple):
    """What a video shows. Where no object is found, the words are empty."""

    color: str = ""
    shape: str = ""
    place: str = ""
    motion: str = ""
    speed: str = ""
    background: str = ""


def seen(video: Tensor, every: int = 1) -> Seen:
    """What a video (frames, 3, size, size) in 0..1 shows, of which one of so many frames is there."""
    seen_hues = hues(video, COLORS)
    ground, inside = ground_and_objects(seen_hues)
    background = COLORS[ground]
    if not inside.any():
        return Seen(background=background)
    color = COLORS[_most_frequent(seen_hues[inside])]
    masks = share_of(color, background, video)
    if masks.flatten(1).sum(1).min() < 4:  # pixels
        return Seen(background=background)
    x, y, radius = middles(masks)
    scores = alike(brought_to_the_middle(masks, x, y, radius), SHAPES)  # (frames, shapes, angles)
    shape = scores.amax(2).mean(0).argmax()
    rates = Rates(_slope(x), _slope(y), _slope(radius.log()), _turning(scores[:, shape], every))
    motion, speed = _told(rates, every)
    return Seen(color, SHAPES[shape], nearest_place(x, y), motion, speed, background)


def share_right(videos: Sequence[Tensor], clips: Sequence[Clip], every: int = 1) -> dict[str, float]:
    """Of each part of what is seen: the share of the videos in which it is what the clip says. And of "all" of them."""
    right = torch.tensor(
        [
            [getattr(found, part) == getattr(clip, part) for part in Seen._fields]
            for found, clip in zip((seen(video, every) for video in videos), clips, strict=True)
        ]
    )
    return dict(zip(Seen._fields, right.float().mean(0).tolist())) | {"all": right.all(1).float().mean().item()}


def nearest_place(x: Tensor, y: Tensor) -> str:
    """The place in words of an object's middles."""
    return min(PLACES, key=lambda name: math.dist(PLACES[name], (x.mean().item(), y.mean().item())))


def hues(video: Tensor, colors: Sequence[str]) -> Tensor:
    """The number of the closest of these colours of each pixel (frames, size, size), whatever its brightness."""
    directions = functional.normalize(torch.tensor([RGB[name] for name in colors]), dim=1)
    return torch.einsum("fchw,kc->fkhw", functional.normalize(video, dim=1), directions).argmax(1)


def ground_and_objects(hues: Tensor) -> tuple[int, Tensor]:
    """The background's hue, and which pixels (frames, size, size) lie well inside of what has another one."""
    edge = torch.cat([hues[:, 0], hues[:, -1], hues[:, :, 0], hues[:, :, -1]], dim=1)
    ground = _most_frequent(edge)
    return ground, -functional.max_pool2d((hues == ground).float(), 3, stride=1, padding=1) == 0


def _most_frequent(hues: Tensor) -> int:
    return hues.flatten().bincount().argmax().item()


def share_of(color: str, background: str, video: Tensor) -> Tensor:
    """How much of each pixel (frames, size, size) is of the one colour and not of the other, by least squares."""
    directions = torch.tensor([RGB[color], RGB[background]]).T  # (3, 2)
    amounts = torch.einsum("kc,fchw->kfhw", torch.linalg.pinv(directions), video).clamp_min(0)
    share = amounts[0] / amounts.sum(0).clamp_min(1e-3)
    share = functional.avg_pool2d(share, 3, stride=1, padding=1, count_include_pad=False)
    return (share * 2 - 0.5).clamp(0, 1)


def middles(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and root mean square distance from there, of each mask, (masks,) each."""
    x, y = grid(masks.shape[-1])
    weights = masks / masks.sum((1, 2), keepdim=True)
    middle_x, middle_y = (weights * x).sum((1, 2)), (weights * y).sum((1, 2))
    squares = (x - middle_x[:, None, None]).square() + (y - middle_y[:, None, None]).square()
    return middle_x, middle_y, (weights * squares).sum((1, 2)).sqrt()


def brought_to_the_middle(masks: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """The masks (masks, SIDE, SIDE) of one size in the middle of the picture."""
    steps = torch.stack(grid(SIDE), dim=-1)  # (SIDE, SIDE, 2)
    places = torch.stack([x, y], dim=-1)[:, None, None] + 2.2 * radius[:, None, None, None] * steps
    return functional.grid_sample(masks[:, None], places, align_corners=False)[:, 0]


def alike(masks: Tensor, shapes: tuple[str, ...]) -> Tensor:
    """Correlation of each mask with each of these outlines at each angle, (masks, shapes, angles)."""
    return torch.einsum("mp,sap->msa", _standardized(masks), _outlines(shapes))


@cache
def _outlines(shapes: tuple[str, ...]) -> Tensor:
    """(shapes, angles, SIDE * SIDE), turned clockwise by 0, 4, 8, ... degrees."""
    x, y = grid(128)
    angles = torch.arange(ANGLES)[:, None, None] * (2 * math.pi / ANGLES)
    turned_x, turned_y = x * angles.cos() + y * angles.sin(), -x * angles.sin() + y * angles.cos()
    drawn = [(OUTLINES[shape](turned_x, turned_y, torch.tensor(0.6)) < 0).float() for shape in shapes]
    return torch.stack([_standardized(brought_to_the_middle(masks, *middles(masks))) for masks in drawn])


def _standardized(masks: Tensor) -> Tensor:
    flat = masks.flatten(1)
    return functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def _slope(values: Tensor) -> float:
    """The change from a frame to the next, by least squares."""
    time = torch.arange(len(values)) - (len(values) - 1) / 2
    return ((time * values).sum() / time.square().sum()).item()


def _turning(scores: Tensor, every: int) -> float:
    """The turn from a frame to the next at which a shape's scores (frames, angles) are highest over all frames."""
    frames = torch.arange(len(scores))
    fastest = 4 * SPEEDS["quickly"] * UNIT.turn * every / 3
    rates = torch.linspace(-fastest, fastest, 65)
    turned = (frames * rates[:, None] * (ANGLES / (2 * math.pi))).round().long()  # (rates, frames)
    starts = torch.arange(ANGLES)[:, None, None]
    found = scores[frames, (starts + turned) % ANGLES].mean(-1).amax(0)  # (rates,)
    best = (found > found.max() - 1e-3).nonzero()[:, 0]  # a ball is alike at all of them: then it stands
    return rates[best].mean().item()


def _told(rates: Rates, every: int) -> tuple[str, str]:
    """The motion and the speed in words: of the change that is largest beside its unit."""
    name = max(Rates._fields, key=lambda name: abs(getattr(rates, name)) / getattr(UNIT, name))
    amount = getattr(rates, name) / (getattr(UNIT, name) * every)
    if abs(amount) < SEEN_FROM:
        return "", ""
    speed = "quickly" if abs(amount) > FASTER_FROM else "slowly"
    return next(motion for motion, of in MOTIONS.items() if getattr(of, name) * amount > 0), speed
