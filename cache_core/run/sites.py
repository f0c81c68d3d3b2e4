"""How a strategy steps in where one module's forward is the site."""

from typing import Any

from ..model import Forward, flattened, is_feature, tensors_in
from ..strategy import FIRST_BLOCK, Request
from .visit import Visit


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
