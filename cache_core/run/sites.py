"""How a strategy steps in where one function is the site: a module's forward, or the prediction without the prompt."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..model import Forward, flattened, is_feature, tensors_in
from ..strategy import CONDITIONAL, FIRST_BLOCK, Request, copied
from .visit import Visit

Predict = Callable[[bool, bool], tuple[Tensor | None, Tensor | None]]  # with the prompt, without; None if not wanted


def at_module(visit: Visit, forward: Forward, args: tuple, kwargs: dict) -> Any:
    """One module's output: the strategy's, or the module's own."""
    if visit.is_excluded:
        return forward(*args, **kwargs)
    inputs = [tensor for tensor in tensors_in((args, kwargs)).values() if is_feature(tensor)]
    decision = visit.decide(inputs, in_rows=inputs[:1])
    if not isinstance(decision, Request):
        return visit.memories[0].structure.filled_with(visit.own(decision))
    counter = visit.call.model.counter
    before = counter.operations
    output = forward(*args, **kwargs)
    visit.operations = counter.operations - before
    visit.units_computed += 1
    if decision is FIRST_BLOCK:
        visit.note("there is no first block to test, so every call is computed")
        return output
    features, structure = flattened(output)
    parts = visit.split(features) if features else None
    if parts is None or structure.has_other_tensors:
        visit.exclude()
    elif visit.wants(parts):
        visit.keep(visit.copies(parts), structure)
    return output


def at_guidance(visit: Visit, predict: Predict) -> tuple[Tensor, Tensor]:
    """The noise predictions with and without the prompt: the model's own, or the strategy's for the one without.

    `predict(with, without)` computes those that are wanted.
    """
    decision = visit.decide(())
    if decision is CONDITIONAL:
        conditional, _ = predict(True, False)
        with visit.call.watch:
            decision = visit.decide_with(copied([conditional]))
        if not isinstance(decision, Request):
            return conditional, decision[0]
        _, unconditional = predict(False, True)
    else:
        conditional, unconditional = predict(True, True)
    visit.units_computed += 1
    if visit.wants([(conditional, unconditional)]):
        visit.keep([copied([conditional, unconditional])])
    return conditional, unconditional
