"""New training pictures with their prompts."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from cache_core.demo import scene, still_life

Told = tuple[Tensor, list[str]]  # pictures (count, 3, size, size) in 0..1, and their prompts


def random_pictures(
    count: int, chance: random.Random, size: int = 64, generator: torch.Generator | None = None
) -> Told:
    """Of one object on a background."""
    told = [scene.random_scene(chance) for _ in range(count)]
    return scene.render(told, size, generator), list(map(scene.prompt_of, told))


def random_still_lifes(count: int, chance: random.Random, generator: torch.Generator | None = None) -> Told:
    """Of one object or two, with finishes and fine lines, 128 pixels wide."""
    told = [still_life.random_still_life(chance) for _ in range(count)]
    return still_life.render(told, generator=generator), list(map(still_life.prompt_of, told))
