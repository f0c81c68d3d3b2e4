"""The processes among which diffusers splits a forward pass, and where along it the tokens are split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook
from diffusers.hooks.hooks import ModelHook
from torch import nn

from ...model.chains import block_lists
from ...model.compiled import method_of, uncompiled
from ...model.hooks import Forward, Hook

ORDER = (
    "Parallelism was enabled after the cache was put on the {}, so the cache would be given a part of the tokens only. "
    "Call disable_cache(transformer), then transformer.enable_parallelism(...), then put the cache on again."
)


def parallel_group(model: nn.Module) -> Any:
    """The ranks among which diffusers splits the tokens or the weights, if `model.enable_parallelism` was called."""
    config = getattr(model, "_parallel_config", None)
    if tokens := getattr(config, "context_parallel_config", None):
        return tokens._flattened_mesh.get_group()
    weights = getattr(config, "tensor_parallel_config", None)
    return None if weights is None else weights._mesh.get_group()


class TokenSplits:
    """The blocks at which diffusers splits or gathers the tokens: Wan's first, Qwen-Image's first, or what a plan says.

    diffusers' hooks do that inside the block's `forward`. Seen from around it, the first block takes all tokens and
    gives this rank's, and no chain is found. So for the length of a call those hooks do nothing (`resting()`), and
    `hooks` do the same around all that strategies put on the block: each block takes and gives this rank's tokens, also
    one that is left out. diffusers' hooks that load weights stay where they are, inside.

    Raises RuntimeError where diffusers splits the model's arguments before our hook is given them.
    """

    def __init__(self, model: nn.Module) -> None:
        hooks = _hooks_on(model)
        ours = next((place for place, hook in enumerate(hooks) if hasattr(hook, "engine")), 0)
        if any(isinstance(hook, ContextParallelSplitHook) for hook in hooks[ours:]):
            raise RuntimeError(ORDER.format(type(uncompiled(model)).__name__))
        blocks = (block for _, members in block_lists(model) for block in members.values())
        splits = [(block, found) for block in blocks if (found := _splits_on(block))]
        self._references = [hook.fn_ref for _, found in splits for hook in found]
        self.hooks = tuple(Hook(block, _Split(block, found), method_of(block, {})) for block, found in splits)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While diffusers' own hooks at these blocks do nothing."""
        found = [(reference, reference.pre_forward, reference.post_forward) for reference in self._references]
        try:
            for reference in self._references:
                reference.pre_forward, reference.post_forward = _as_given, _as_returned
            yield
        finally:
            for reference, before, after in found:
                reference.pre_forward, reference.post_forward = before, after


class _Split:
    """What diffusers' hooks do before and after a block, around whatever is around it."""

    def __init__(self, block: nn.Module, hooks: list[ModelHook]) -> None:
        self.block, self.hooks = block, hooks

    def __call__(self, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        for hook in reversed(self.hooks):  # the last one registered is outermost
            args, kwargs = hook.pre_forward(self.block, *args, **kwargs)
        output = forward(*args, **kwargs)
        for hook in self.hooks:
            output = hook.post_forward(self.block, output)
        return output


def _splits_on(block: nn.Module) -> list[ModelHook]:
    return [
        hook for hook in _hooks_on(block) if isinstance(hook, (ContextParallelSplitHook, ContextParallelGatherHook))
    ]


def _hooks_on(module: nn.Module) -> list[ModelHook]:
    """diffusers' hooks, the innermost first."""
    registry = getattr(uncompiled(module), "_diffusers_hook", None)
    return [] if registry is None else [registry.hooks[name] for name in registry._hook_order]


def _as_given(block: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _as_returned(block: nn.Module, output: Any) -> Any:
    return output
