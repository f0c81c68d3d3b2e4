"""Put a strategy on a transformer of diffusers, say whose forward pass comes next, and take it off again.

    handle = apply(pipe.transformer, FirstBlockCacheConfig(threshold=0.08), scheduler=pipe.scheduler)
    image = pipe(prompt).images[0]
    handle.remove()

The functions do what the methods of diffusers' `CacheMixin` do, also for models that lack it, and those methods work on
what was enabled here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...report.report import Report
from ...strategy.strategy import Strategy

logger = logging.getLogger(__name__)

HOOK_NAMES = {  # diffusers' config -> the name under which diffusers' own `disable_cache` looks for a hook
    "FirstBlockCacheConfig": "fbc_leader_block_hook",
    "TaylorSeerCacheConfig": "taylorseer_cache",
    "PyramidAttentionBroadcastConfig": "pyramid_attention_broadcast",
    "FasterCacheConfig": "faster_cache_denoiser",
}


class Handle:
    """A strategy on a model, until `remove()` or the end of a `with`."""

    def __init__(self, model: nn.Module, hook: Any) -> None:  # a RootHook: importing it imports diffusers
        self.model = model
        self._hook, self._engine = hook, hook.engine

    @property
    def engine(self) -> Any:
        """What runs the model's forward passes, a `root.Engine`; None once the strategy was taken off."""
        return self._hook.engine

    @property
    def report(self) -> Report | None:
        """What was done in the sampling run that is on, or in the last; None before the first and in strict parity."""
        return getattr(self._engine, "report", None)

    def remove(self) -> None:
        """Take the strategy off. The model is as it was, other hooks on it work on, in whatever order they came."""
        self._hook.detach(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply(
    model: nn.Module, config: Any, strict_parity: bool = False, scheduler: Any = None, group: Any = None
) -> Handle:
    """Put a strategy on a model.

    `config` is one of our strategies, or diffusers' config of First Block Cache, TaylorSeer, Pyramid Attention
    Broadcast or FasterCache. `scheduler` is the pipeline's, so that the step can be read off its schedule.
    `strict_parity` (diffusers' configs only) reproduces diffusers 0.42.1 bit for bit, with its known defects.
    `group` is a process group of torch.distributed whose ranks share the tokens of each forward pass, its weights or
    the prompts, so that they decide alike. With diffusers' own `model.enable_parallelism(...)` it is found by itself.

    Raises ValueError if caching is enabled already or the config cannot be used. Nothing is attached then.
    """
    present = getattr(model, "_cache_config", None)
    if present is not None:
        raise ValueError(
            f"Caching has already been enabled with {type(present)}. Call disable_cache(model), or remove() of the "
            "handle that apply returned, first."
        )
    from .root import RootHook

    name, marker = _name_and_marker(config)
    return Handle(
        model, RootHook.attached(model, _engine(model, config, strict_parity, scheduler, group), name, marker)
    )


def enable_cache(
    model: nn.Module, config: Any, strict_parity: bool = False, scheduler: Any = None, group: Any = None
) -> None:
    """Like `apply`, until `disable_cache(model)` or the model's own `disable_cache()`."""
    apply(model, config, strict_parity, scheduler, group)


def disable_cache(model: nn.Module) -> None:
    """Take off what `apply` or `enable_cache`, ours or diffusers', put on the model."""
    from .root import RootHook

    hook = RootHook.of(model)
    if hook is not None:
        hook.detach(model)
    elif getattr(model, "_cache_config", None) is not None and hasattr(model, "disable_cache"):
        model.disable_cache()
    else:
        logger.warning("disable_cache: caching is not enabled on %s, so nothing was done.", type(model).__name__)


@contextmanager
def cache_context(model: nn.Module, name: str, **fields: Any) -> Iterator[None]:
    """Say whose forward pass the calls inside are: `name` is the branch ("cond", "uncond").

    `fields` are those of diffusers' `CacheContext`: step_index, num_inference_steps, timestep, sigma. Unlike diffusers'
    method, leaving an inner context brings back the outer one.
    """
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    from .root import context_of

    context, outer = CacheContext(name, **fields), context_of(model)
    _set_cache_context(model, context)
    try:
        yield
    finally:
        _set_cache_context(model, outer)


def _engine(model: nn.Module, config: Any, strict_parity: bool, scheduler: Any, group: Any) -> Any:
    from .cached import CachedModel
    from .parallel import parallel_group

    if strict_parity and (group is not None or parallel_group(model) is not None):
        raise ValueError(
            "strict_parity does as diffusers does, where each rank decides alone, and ranks that share a forward pass "
            "would wait for each other for ever. Leave out strict_parity."
        )
    if strict_parity:
        from .strict import engine_for

        return engine_for(model, config)
    return CachedModel(model, config, scheduler, group)


def _name_and_marker(config: Any) -> tuple[str, Any]:
    """The name our hook goes by, and a config by which diffusers' own `disable_cache` finds that name.

    It knows only configs of its own. A strategy of ours goes by the counterpart it has there, and if it has none, by
    First Block Cache's: the name has no other meaning.
    """
    import diffusers.hooks

    if isinstance(config, Strategy):
        counterpart = f"{type(config).__name__}Config"
        known = counterpart if counterpart in HOOK_NAMES else "FirstBlockCacheConfig"
        return HOOK_NAMES[known], getattr(diffusers.hooks, known)()
    for known, name in HOOK_NAMES.items():
        if isinstance(config, getattr(diffusers.hooks, known)):
            return name, config
    raise ValueError(
        f"Cache config {type(config)} is not supported. Pass a strategy of cache_core.strategies, or one of diffusers' "
        f"{', '.join(HOOK_NAMES)}."
    )
