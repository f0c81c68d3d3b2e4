"""Hooks: functions around modules' forwards for the length of a `with`, and away again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]
Around = Callable[..., Any]  # around(forward, *args, **kwargs): what the module shall return


class HookRegistry:
    """Functions to run around the forwards of modules.

        hooks = HookRegistry()
        hooks.add(block, lambda forward, *args, **kwargs: forward(*args, **kwargs))
        with hooks:
            model(latent)

    Inside the `with`, the module instances carry a stand-in for `forward`; of two functions on one module the one added
    last runs first. On the way out, exception or not, every instance is as it was before. A patch that someone else put
    on top meanwhile stays, and then finds the module's own forward behind it.
    """

    def __init__(self) -> None:
        self._hooks: list[tuple[nn.Module, Around, str]] = []
        self._installed: list[_StandIn] = []

    def add(self, module: nn.Module, around: Around, method: str = "forward") -> None:
        """Run `around(forward, *args, **kwargs)` in place of the module's forward, or of another method."""
        self._hooks.append((module, around, method))

    def extend(self, other: HookRegistry) -> None:
        """Add all functions of another registry."""
        self._hooks.extend(other._hooks)

    @property
    def hooked(self) -> dict[nn.Module, str]:
        """The modules that have a hook, and the attribute that it stands in for."""
        return {module: method for module, _, method in self._hooks}

    def __enter__(self) -> HookRegistry:
        try:
            for module, around, method in self._hooks:
                self._installed.append(_StandIn(module, around, method))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._installed:
            self._installed.pop().uninstall()


@torch._disable_dynamo
def unseen(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that must not be compiled, nor what it calls."""
    return function(*args, **kwargs)


class _StandIn:
    """Stands in for one module's forward, or for another method."""

    def __init__(self, module: nn.Module, around: Around, method: str) -> None:
        self.module, self.method = module, method
        self.around: Around | None = around
        self.forward = getattr(module, method)
        self.was_patched = method in vars(module)
        setattr(module, method, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # someone compiled what is around us after it was looked for
            return unseen(self._run, *args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.around is None:
            return self.forward(*args, **kwargs)
        return self.around(self.forward, *args, **kwargs)

    def uninstall(self) -> None:
        self.around = None
        if vars(self.module).get(self.method) is not self:
            return  # patched by someone else since: leave theirs, which calls through us
        if self.was_patched:
            setattr(self.module, self.method, self.forward)
        else:
            delattr(self.module, self.method)
