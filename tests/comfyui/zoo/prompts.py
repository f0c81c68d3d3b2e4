"""What nodes give a model as CONDITIONING: text, and what else it asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .architecture import TEXT, Draw

Drawn = Callable[[Draw], Any]


def text(width: int, tokens: int = TEXT, **extra: Drawn) -> Callable[[Draw], list]:
    """A prompt: so many tokens of this width, drawn first, then whatever else."""
    return lambda draw: [[draw(1, tokens, width), {name: make(draw) for name, make in extra.items()}]]


def normal(*shape: int) -> Callable[[Draw], Tensor]:
    """Random numbers of this shape."""
    return lambda draw: draw(*shape)


def reference(*shape: int) -> Callable[[Draw], list[Tensor]]:
    """A picture to go by, as a list of one."""
    return lambda draw: [draw(*shape)]


def mask(tokens: int = TEXT) -> Callable[[Draw], Tensor]:
    """All tokens are meant."""
    return lambda _: torch.ones(1, tokens, dtype=torch.int64)


def nothing(_: Draw) -> None:
    """As a node leaves it out."""
