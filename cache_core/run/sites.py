"""How a strategy steps in where one module's forward is the site."""

from functools import partial
from typing import Any

from ..model import Forward, flattened, is_feature, tensors_in
from ..strategy import FIRST_BLOCK, Features, Request
from ..strategy.packed import packed
from .visit import Visit

NO_BLOCK = "there is no first block to test, so every call is computed"
EXCLUDED = "{} always runs: it returns something that can't be kept"


def at_module(visit: Visit, forward: Forward, args: tuple, kwargs: dict) -> Any:
    """One module's output: the strategy's, or the module's own."""
    if visit.is_excluded:
        return forward(*args, **kwargs)
    inputs = [tensor for tensor in tensors_in((args, kwargs)).values() if is_feature(tensor)]
    decision = visit.decide(inputs, in_rows=inputs[:1])
    if not isinstance(decision, Request):
        kept = visit.memories[0]  # the model may write into what it gets
        return kept.structure.filled_with([each.clone() if kept.holds(each) else each for each in decision])
    counter = visit.call.model.counter
    before = counter.operations
    output = forward(*args, **kwargs)
    visit.operations = counter.operations - before
    visit.units_computed += 1
    if decision is FIRST_BLOCK:
        visit.note(NO_BLOCK)
        return output
    features, structure = flattened(output)
    parts = visit.split(features) if features else None
    if parts is None or structure.has_other_tensors:
        visit.call.run.memories.excluded.add((visit.strategy, visit.site))
        visit.note(EXCLUDED.format(visit.site.name or "the model"))
    elif visit.wants(parts):
        visit.keep(_copies(visit, parts), structure)
    return output


def _copies(visit: Visit, parts: list[Features]) -> list[Features]:
    """Of each branch that keeps its share its own, in the form in which it is kept: what one branch drops is free."""
    own = partial(packed, dtype=visit.strategy.stored_as(visit.site), copy=True)
    return [tuple(map(own, part)) if visit.keeps(number) else () for number, part in enumerate(parts)]
