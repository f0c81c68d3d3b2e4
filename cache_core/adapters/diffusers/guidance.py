"""Calls for the branches of the prompt, with it and without, one of which may be left out.

`through(branches, arguments)` calls the model. `guided(predict)` gives the predictions with the prompt and without,
where `predict(with, without)` makes the model calls for those that are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...model.structure import Structure, flattened
from .arguments import Arguments

GIVEN, WITHOUT, JOINED = "cond", "uncond", "cond_uncond"  # diffusers' names of the contexts; joined is [without, with]
Predictions = tuple[Tensor | None, Tensor | None]
Guided = Callable[[Callable[[bool, bool], Predictions]], tuple[Tensor, Tensor]]


class Apart:
    """The branch without the prompt, in a call of its own after that of the other."""

    def __init__(self) -> None:
        self._structure: Structure | None = None  # of the model's output

    def output(self, through: Callable[[], Any], guided: Guided, given: Tensor) -> Any:
        """The model's own output, or one made of the other branch's prediction `given`."""
        computed: list[Any] = []

        def predict(_: bool, without: bool) -> Predictions:
            if without:
                computed.append(through())
            return given, flattened(computed[0])[0][0] if without else None

        _, prediction = guided(predict)
        if not computed:
            return self._structure.filled_with([prediction])
        self._structure = flattened(computed[0])[1]
        return computed[0]


def joined_output(through: Callable[..., Any], guided: Guided, arguments: Arguments, names: Sequence[str]) -> Any:
    """Both branches in one batch: the model's own output, or one whose first half is made of the other.

    `names` are keyword arguments known to hold both.
    """
    whole: list[Any] = []
    halves: list[Any] = []

    def predict(given: bool, without: bool) -> Predictions:
        if given and without:
            whole.append(through((WITHOUT, GIVEN), arguments))
            first, second = flattened(whole[0])[0][0].chunk(2)
            return second, first
        halves.append(through((GIVEN if given else WITHOUT,), half_of(arguments, names, half=int(given))))
        prediction = flattened(halves[-1])[0][0]
        if len(prediction) * 2 != len(arguments.latent):
            raise RuntimeError(f"it gave {len(prediction)} rows for {len(arguments.latent) // 2}")
        return (prediction, None) if given else (None, prediction)

    given, without = guided(predict)
    if whole:
        return whole[0]
    return flattened(halves[0])[1].filled_with([torch.cat([without, given])])


def half_of(arguments: Arguments, names: Sequence[str], half: int) -> Arguments:
    """The arguments of one branch: half 0 is the one without the prompt, half 1 the one with it.

    Halved are all positional tensors, keyword arguments in `names`, and whatever else has a row, or an item of a list,
    for each row of the batch.
    """
    rows = arguments.latent.shape[0]

    def halved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.chunk(2)[half] if value.ndim and value.shape[0] == rows else value
        if isinstance(value, dict):
            return {name: halved(item) for name, item in value.items()}
        if not isinstance(value, (tuple, list)):
            return value
        if len(value) == rows and not any(isinstance(item, Tensor) and item.shape[:1] == (rows,) for item in value):
            return value[: rows // 2] if half == 0 else value[rows // 2 :]
        return type(value)(halved(item) for item in value)

    def halved_argument(name: str, value: Any) -> Any:
        if name in names and isinstance(value, Tensor) and value.shape[:1].numel() % 2 == 0:
            return value.chunk(2)[half]
        return halved(value)

    args = tuple(map(halved, arguments.args))
    kwargs, named = (
        {name: halved_argument(name, value) for name, value in given.items()}
        for given in (arguments.kwargs, arguments.named)
    )
    return Arguments(args, kwargs, named)
