"""What the engines share: states by context, and functions around modules for one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from diffusers.hooks.hooks import CacheContext
from torch import nn

from ....model.hooks import Around, HookRegistry

State = TypeVar("State")


class States(Generic[State]):
    """One state for each context, made when first asked for. Contexts of one name are one, as in diffusers."""

    def __init__(self, new_state: Callable[[], State]) -> None:
        self._new_state = new_state
        self._states: dict[str, State] = {}

    def of(self, context: CacheContext | None) -> State:
        if context is None:
            raise ValueError(
                'No cache context is set. Call the model inside `with cache_context(model, "cond"):`, with one name '
                "for each branch of the prompt."
            )
        if context.name not in self._states:
            self._states[context.name] = self._new_state()
        return self._states[context.name]

    def clear(self) -> None:
        self._states.clear()


def run_with(
    arounds: Mapping[nn.Module, Around],
    model: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`forward(*args, **kwargs)` with functions around modules. `forward` is the model's; it may have one as well."""
    hooks = HookRegistry()
    for module, around in arounds.items():
        if module is not model:
            hooks.add(module, around)
    with hooks:
        return arounds[model](forward, *args, **kwargs) if model in arounds else forward(*args, **kwargs)
