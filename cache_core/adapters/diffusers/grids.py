"""Packed latents as pictures: predictions of (batch, tokens, channels) put back into rows and columns.

A frequency is one along height and width. How many rows and columns the tokens are, the model is told with each call;
what it is told must fit the number of tokens, and their order, or they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from .arguments import Arguments

Shape = tuple[int, int, int]  # frames, rows, columns
SIZES = ("num_frames", "height", "width")  # LTX


def grid_of(arguments: Arguments) -> Shape | None:
    """The shape that the tokens of a model call make, if it is told one that fits them. May wait for the device."""
    latent, named = arguments.latent, arguments.named
    if latent.ndim != 3:
        return None
    if isinstance(ids := named.get("img_ids"), Tensor):  # Flux
        return _of_ids(ids, latent.shape[1])
    shapes = named.get("img_shapes")  # Qwen-Image
    shape = _only_one(shapes) if shapes else tuple(named.get(size) for size in SIZES)
    fits = shape is not None and len(shape) == 3 and all(isinstance(count, int) for count in shape)
    return shape if fits and prod(shape) == latent.shape[1] else None


def on_grid(
    shape: Shape | None, guide: Callable[[Callable[..., Any]], tuple[Tensor, Tensor]], predict: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """What `guide(predict)` gives, where it sees packed predictions as pictures, or as videos."""
    if shape is None:
        return guide(predict)

    def pictured(given: bool, without: bool) -> tuple[Tensor | None, ...]:
        return tuple(None if each is None else as_picture(each, shape) for each in predict(given, without))

    given, without = guide(pictured)
    return _as_tokens(given), _as_tokens(without)


def as_picture(tokens: Tensor, shape: Shape | None) -> Tensor:
    """The tokens as (batch, channels, frames, rows, columns), if they make this shape."""
    if shape is None or tokens.ndim != 3 or tokens.shape[1] != prod(shape):
        return tokens
    return tokens.unflatten(1, shape).movedim(-1, 1)


def _as_tokens(picture: Tensor) -> Tensor:
    return picture.movedim(1, -1).flatten(1, 3) if picture.ndim == 5 else picture


def _of_ids(ids: Tensor, tokens: int) -> Shape | None:
    """Of Flux's positions, (..., tokens, axes): row and column are the second and the third."""
    places = (ids[0] if ids.ndim == 3 else ids)[:, 1:3].long().cpu()
    rows, columns = (int(count) + 1 for count in places.amax(dim=0))
    in_order = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) if rows * columns == tokens else None
    return (1, rows, columns) if in_order is not None and torch.equal(places, in_order) else None


def _only_one(shapes: Any) -> Any:
    """The one shape of nested lists of shapes, all alike; None where a call has several pictures."""
    while isinstance(shapes, list):
        if any(each != shapes[0] for each in shapes):
            return None
        shapes = shapes[0] if shapes else None
    return shapes
