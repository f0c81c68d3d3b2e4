"""The one thing attached to a model: a hook of diffusers on its root that hands every forward pass to an engine.

Pipelines reach it as they reach diffusers' own cache hooks: `cache_context` sets the context on the `StateManager` it
holds, the end of a pipeline call resets it, `disable_cache` removes it by name.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...model.compiled import uncompiled

try:
    from diffusers.hooks.hooks import CacheContext, HookRegistry, ModelHook, StateManager
except ImportError as error:
    raise ImportError("Caching on diffusers' models needs diffusers 0.42.1: pip install diffusers==0.42.1") from error


logger = logging.getLogger(__name__)

UNCOMPILED = (
    "Refrain: the transformer is compiled as a whole, around its cache, so it runs without torch.compile. Compile its "
    "blocks instead: transformer.compile_repeated_blocks(), before or after the cache is put on."
)
HOOKS_ARE_NOT_COPIED = (
    "Refrain: a copy of this transformer would run the original's weights, for other hooks of diffusers are on it too "
    "({}). Take the cache off first, with disable_cache(transformer), copy, and put it on both."
)


OF_COPY = "_hook_of_a_copy"  # argument: the forward of a model's copy still leads to the original's hook
RESET = "_reset_stateful_cache"  # what pipelines call at their end, on models that have it


class Engine(Protocol):
    """Runs the forward passes of one model, and remembers between them what it needs."""

    def call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: CacheContext | None
    ) -> Any:
        """One forward pass. `forward` is what lies behind the hook; a call of the model itself ends there as well."""

    def reset(self) -> None:
        """The sampling run is over: drop what was kept."""


@dataclass(frozen=True)
class Before:
    """What a model had of its own before our hook came: the attributes that stay when it goes."""

    registry: bool
    forward: bool
    config: bool
    owner: nn.Module | None  # the module whose forward the registry wrapped

    @classmethod
    def of(cls, model: nn.Module) -> Before:
        own, registry = vars(uncompiled(model)), vars(uncompiled(model)).get("_diffusers_hook")
        owner = getattr(registry, "_module_ref", None)
        return cls(registry is not None, "forward" in vars(model), "_cache_config" in own, owner)


class RootHook(ModelHook):
    """Hands a model's forward passes to an engine. Once taken off, it passes them on untouched."""

    _is_stateful = True

    def __init__(self, engine: Engine, name: str, marker: Any, before: Before) -> None:
        super().__init__()
        self.engine: Engine | None = engine
        self.name, self.marker, self.before = name, marker, before
        self.contexts = StateManager(dict)  # only its context is used
        self._model: weakref.ref[nn.Module] = lambda: None
        self._is_inside = self._said_uncompiled = False
        self._outside: Callable[..., Any] | None = None  # what the model's forward was right after registration

    @classmethod
    def attached(cls, model: nn.Module, engine: Engine, name: str, marker: Any) -> RootHook:
        """A new hook on the model, registered under `name`; `marker` is what `model._cache_config` shall be."""
        hook = cls(engine, name, marker, Before.of(model))
        registry = HookRegistry.check_if_exists_or_initialize(model)
        registry._module_ref = model  # what torch.compile made of it finds the registry that a first run left inside
        registry.register_hook(hook, name)
        hook._outside, hook._model = model.forward, weakref.ref(model)
        model._cache_config = marker
        if not hasattr(model, RESET):  # it has no CacheMixin: the end of a pipeline's call would pass it over
            setattr(model, RESET, model._diffusers_hook.reset_stateful_hooks)
        return hook

    @classmethod
    def of(cls, model: nn.Module) -> RootHook | None:
        """Our hook on this model, if there is one."""
        hooks = model._diffusers_hook.hooks.values() if hasattr(model, "_diffusers_hook") else ()
        return next((hook for hook in hooks if isinstance(hook, cls)), None)

    def detach(self, model: nn.Module) -> None:
        """Take it off, unless that was done. A patch that someone put on top of the model's forward stays."""
        if RootHook.of(model) is not self:
            return
        forward = vars(model).get("forward")
        model._diffusers_hook.remove_hook(self.name, recurse=False)
        if forward is not None and forward is not self._outside:
            model.forward = forward

    def __deepcopy__(self, memo: dict[int, Any]) -> RootHook:
        model = self._model()
        if model is not None and len(model._diffusers_hook.hooks) > 1:
            raise RuntimeError(HOOKS_ARE_NOT_COPIED.format(", ".join(model._diffusers_hook.hooks)))
        memo[id(self)] = hook = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(hook, name, deepcopy(value, memo))
        copied = memo.get(id(model))
        hook._model = (lambda: None) if copied is None else weakref.ref(copied)
        return hook

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if torch.compiler.is_compiling():
            _not_compiled(_relink, self, module)
            return args, kwargs
        _relink(self, module)  # the registry calls this even when it has cut `new_forward` out
        hook = RootHook.of(module)
        return args, kwargs if hook in (None, self) else kwargs | {OF_COPY: hook}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _not_compiled(self._run_uncompiled, *args, **kwargs)
        hook = kwargs.pop(OF_COPY, self)
        return hook._run(*args, **kwargs)

    def _run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        if not self._said_uncompiled:
            self._said_uncompiled = True
            logger.warning(UNCOMPILED)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        if self._is_inside or self.engine is None:
            return forward(*args, **kwargs)
        self._is_inside = True
        try:
            return self.engine.call(forward, args, kwargs, self.contexts._context)
        finally:
            self._is_inside = False

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.contexts.reset()
        if self.engine is not None:
            self.engine.reset()
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:  # spelt so in diffusers
        """Mend what diffusers' `remove_hook`, which is calling, breaks or leaves behind."""
        registry = module._diffusers_hook
        _relink(self, module)
        behind, place = self.fn_ref.original_forward, registry._hook_order.index(self.name)
        if place + 1 < len(registry._hook_order):
            outer = registry.hooks[registry._hook_order[place + 1]]
            outer.fn_ref.forward = behind
            _relink(outer, module)
        else:
            module.forward = behind
        if len(registry.hooks) == 1 and not self.before.forward:
            del module.forward
        if len(registry.hooks) == 1 and not self.before.registry:
            del module._diffusers_hook
        vars(module).pop(RESET, None)
        if getattr(module, "_cache_config", None) is self.marker:
            module._cache_config = None
            if not self.before.config:
                del module._cache_config
        self.engine.reset()
        self.engine = None
        return self.before.owner if len(registry.hooks) == 1 and self.before.registry else module


def context_of(model: nn.Module) -> CacheContext | None:
    """The context that is set on the model now, read off the first hook that was told it."""
    if not hasattr(model, "_diffusers_hook"):
        return None
    registries = (model._diffusers_hook, *model._diffusers_hook._get_child_registries())
    hooks = (hook for registry in registries for hook in registry.hooks.values() if hook._is_stateful)
    told = (value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager))
    return next((states._context for states in told), None)


def _relink(hook: ModelHook, module: nn.Module) -> None:
    """Put the hook's `new_forward` back into its place in the chain.

    When the hook below is removed, diffusers 0.42.1 writes what lay behind that one over `fn_ref.forward`, which was
    this hook's `new_forward`, and leaves `fn_ref.original_forward` pointing at the removed hook.
    """
    reference = hook.fn_ref
    if not hasattr(hook, "new_forward") or getattr(reference.forward, "func", None) == hook.new_forward:
        return
    reference.original_forward = reference.forward
    reference.forward = functools.update_wrapper(functools.partial(hook.new_forward, module), hook.new_forward)


@torch._disable_dynamo
def _not_compiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that must not be compiled, nor what it calls. With fullgraph=True torch's error says why."""
    return function(*args, **kwargs)


_not_compiled._torchdynamo_disable, _not_compiled._torchdynamo_disable_msg = True, UNCOMPILED
