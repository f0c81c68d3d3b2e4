"""How a strategy steps in at one module, and at the guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..model.hooks import Forward
from ..model.structure import flattened, is_feature, tensors_in
from ..strategy.strategy import CONDITIONAL, FIRST_BLOCK
from ..strategy.tensors import copied
from .rows import has_rows, join_rows, rows_layout, split_rows

if TYPE_CHECKING:
    from .visit import Visit


def at_module(visit: Visit, forward: Forward, args: tuple, kwargs: dict) -> Any:
    """One module's output: the strategy's, or the module's own."""
    if visit.is_barred:
        return forward(*args, **kwargs)
    inputs = [tensor for tensor in tensors_in((args, kwargs)).values() if is_feature(tensor)]
    if not has_rows(inputs[:1], visit.branch_count):
        visit.take_as_one()
    branches = visit.branches(rows_layout(inputs, visit.branch_count))
    decision = branches.decide()
    if isinstance(decision, list):
        visit.answered()
        return visit.structure.filled_with(copied(join_rows(decision)))  # a copy: the model may write into it
    output = forward(*args, **kwargs)
    visit.unit_computed()
    if decision is FIRST_BLOCK:
        visit.note("there is no first block to test, so every call is computed")
        return output
    features, structure = flattened(output)
    parts = split_rows(features, visit.branch_count) if features else None
    if parts is not None and not structure.has_other_tensors:
        branches.keep([copied(part) for part in parts])  # each its own: what one branch drops is free
        visit.kept(structure)
    else:
        visit.bar()
    return output


def at_guidance(visit: Visit, predict: Callable[[bool, bool], tuple]) -> tuple[Tensor, Tensor]:
    """The noise predictions with and without the prompt: the model's own, or the strategy's for the one without.

    `predict(with, without)` computes those that are wanted.
    """
    branches = visit.branches(())
    decision = branches.decide()
    if decision is CONDITIONAL:
        conditional, _ = predict(True, False)
        with visit.call.watch:
            decision = branches.decide([copied([conditional])])
        if isinstance(decision, list):
            visit.answered()
            return conditional, decision[0][0]
        _, unconditional = predict(False, True)
    else:
        conditional, unconditional = predict(True, True)
    visit.unit_computed()
    branches.keep([copied([conditional, unconditional])])
    visit.kept()
    return conditional, unconditional
