"""Models compiled with torch.compile: strategies step in between what is compiled, never inside.

A hook inside a compiled module would be traced with it, and make it compile again at every call. So for the length of
a call what is compiled around a hook runs as it was written, in Python, and each block in it runs compiled on its own,
by the same compiler. Blocks that are compiled already, one by one, are left as they are. Nothing of ours is then seen
by the compiler: no graph breaks, and nothing to compile again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from .hooks import Forward, Hook

INSIDE = "_orig_mod"  # where torch.compile(module) keeps the module, and the part of dotted names that it adds
CALL = "_compiled_call_impl"  # what module.compile() puts in place of the module's own call


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself, without what torch.compile(module) wrapped around it."""
    while INSIDE in module._modules and hasattr(module, "dynamo_ctx"):
        module = module._modules[INSIDE]
    return module


def is_compiled(module: nn.Module) -> bool:
    """Whether this very module is what torch.compile(module) or module.compile() made."""
    return module is not uncompiled(module) or getattr(module, CALL, None) is not None


def own_name(name: str) -> str:
    """A dotted name as it would be if nothing were compiled."""
    return ".".join(part for part in name.split(".") if part != INSIDE)


def entry_of(module: nn.Module, method: str = "forward") -> str:
    """The attribute that a hook must stand in for, so that it is around what is compiled and not inside."""
    return CALL if method == "forward" and getattr(module, CALL, None) is not None else method


def method_of(module: nn.Module, methods: Mapping[str, str]) -> str:
    """The attribute through which a model runs this module. `methods` names, by class, those other than `forward`."""
    return entry_of(module, methods.get(type(uncompiled(module)).__name__, "forward"))


class Compilation:
    """What of a model is compiled."""

    def __init__(self, model: nn.Module) -> None:
        self._around: dict[nn.Module, tuple[nn.Module, ...]] = {}  # the compiled modules that a module lies in
        self._own: dict[nn.Module, Callable[..., Any]] = {}  # modules' forwards, compiled on their own
        for module in model.modules():
            if module is not uncompiled(module) or (module is not model and getattr(module, CALL, None) is not None):
                for inner in module.modules():
                    if inner is not module:
                        self._around[inner] = (*self._around.get(inner, ()), module)
        self.is_none = not self._around

    def opened_at(self, hooked: Iterable[nn.Module]) -> list[Hook]:
        """Hooks that run what is compiled around these modules as it was written. Put them before all others."""
        opened = dict.fromkeys(module for inner in hooked for module in self._around.get(inner, ()))
        return [Hook(module, partial(_as_written, module), entry_of(module)) for module in opened]

    def compiled_alone(self, blocks: Mapping[nn.Module, str]) -> list[Hook]:
        """Hooks that run these blocks, and by what method, compiled by what compiled the model around them."""
        hooks = []
        for block, method in blocks.items():
            compilers = [module.dynamo_ctx for module in self._around.get(block, ()) if hasattr(module, "dynamo_ctx")]
            if compilers and block is uncompiled(block) and entry_of(block) != CALL:
                hooks.append(Hook(block, partial(self._alone, block, compilers[-1]), method))
        return hooks

    def _alone(self, block: nn.Module, compiler: Any, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        if block not in self._own:
            self._own[block] = compiler(forward)
        return self._own[block](*args, **kwargs)


def _as_written(module: nn.Module, _: Forward, /, *args: Any, **kwargs: Any) -> Any:
    inner = uncompiled(module)
    return (inner if inner is not module else module._call_impl)(*args, **kwargs)
