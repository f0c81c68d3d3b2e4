"""The procedural videos: one object of the pictures that moves, turns or grows before a background that stays."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from .scene import PLACES, Pose, chances, grid, ground, tinted, with_object

COLORS = ("red", "yellow", "green", "blue", "purple", "white")
SHAPES = ("ball", "triangle", "star", "heart", "cross", "moon")
PATTERNS = ("plain", "striped", "checkered")
SPEEDS = {"slowly": 1.0, "quickly": 2.4}
DAWN = 0.03  # how much brighter a frame is than the one before
RADIUS = 0.36  # of the picture's 1 from its middle to its edge, at the middle of the video


class Rates(NamedTuple):
    """What changes from a frame to the next."""

    x: float = 0.0
    y: float = 0.0
    growth: float = 0.0  # of the radius' logarithm
    turn: float = 0.0  # in radians, clockwise


UNIT = Rates(0.03, 0.03, 0.025, math.radians(4))
MOTIONS = {  # at the speed that stands for "*"
    "moving * to the left": Rates(x=-UNIT.x),
    "moving * to the right": Rates(x=UNIT.x),
    "moving * up": Rates(y=-UNIT.y),
    "moving * down": Rates(y=UNIT.y),
    "turning * to the left": Rates(turn=-UNIT.turn),
    "turning * to the right": Rates(turn=UNIT.turn),
    "growing *": Rates(growth=UNIT.growth),
    "shrinking *": Rates(growth=-UNIT.growth),
}


class Clip(NamedTuple):
    """What a video shows, in the words of its prompt."""

    color: str
    shape: str
    place: str  # in the middle of the video
    motion: str
    speed: str
    background: str
    pattern: str


def random_clip(generator: random.Random) -> Clip:
    """A motion, then what can be seen to move so: no ball turns, and whatever moves passes through the middle."""
    color, background = generator.sample(COLORS, 2)
    motion = generator.choice(list(MOTIONS))
    rates = MOTIONS[motion]
    return Clip(
        color=color,
        shape=generator.choice(SHAPES[1:] if rates.turn else SHAPES),
        place=generator.choice([place for place, (x, y) in PLACES.items() if not (rates.x * x or rates.y * y)]),
        motion=motion,
        speed=generator.choice(list(SPEEDS)),
        background=background,
        pattern=generator.choice(PATTERNS),
    )


def prompt_of(clip: Clip) -> str:
    """The prompt a video was trained with.

    >>> prompt_of(Clip("red", "star", "top", "moving * to the left", "slowly", "blue", "striped"))
    'a red star at the top moving slowly to the left on a blue striped background'
    """
    moving = clip.motion.replace("*", clip.speed)
    return f"a {clip.color} {clip.shape} at the {clip.place} {moving} on a {clip.background} {clip.pattern} background"


def render(
    clips: Sequence[Clip], frames: int, size: int = 64, generator: torch.Generator | None = None, every: int = 1
) -> Tensor:
    """Videos (batch, frames, 3, size, size) in 0..1. Colours, places, angles and light vary a little from call to call.

    A frame more shows more of the same motion: an object is as fast in videos of 5 frames as in those of 15. `every` is
    of how many frames one is shown. In all of them it dawns: without that, a set of videos would be the same backwards,
    and a model that sees no frame's number, but how far frames are apart, took no notice of which is the first.
    """
    uniform = chances(len(clips), generator)
    x, y = grid(size)
    color = tinted([clip.color for clip in clips], uniform)
    background = tinted([clip.background for clip in clips], uniform)
    picture = ground([clip.pattern for clip in clips], background, x, y, uniform)
    places = torch.tensor([PLACES[clip.place] for clip in clips])[:, :, None, None, None]
    time = every * (torch.arange(frames) - (frames - 1) / 2)
    rates = torch.tensor([[rate * SPEEDS[clip.speed] for rate in MOTIONS[clip.motion]] for clip in clips])
    changes = torch.einsum("bk,f->kbf", rates, time)[..., None, None]
    pose = Pose(
        places[:, 0] + uniform(-0.04, 0.04) + changes[0],  # (batch, frames, 1, 1), as all of a pose
        places[:, 1] + uniform(-0.04, 0.04) + changes[1],
        RADIUS * uniform(0.92, 1.08) * changes[2].exp(),
        uniform(-0.3, 0.3) + changes[3],
    )
    video = with_object(
        repeat(picture, "batch color h w -> (batch frames) color h w", frames=frames),
        [clip.shape for clip in clips for _ in range(frames)],
        repeat(color, "batch color h w -> (batch frames) color h w", frames=frames),
        Pose(*(rearrange(part, "batch frames h w -> (batch frames) 1 h w") for part in pose)),
        x,
        y,
    )
    video = rearrange(video, "(batch frames) color h w -> batch frames color h w", frames=frames)
    return (video * (1 + DAWN * time)[:, None, None, None]).clamp(0, 1)
