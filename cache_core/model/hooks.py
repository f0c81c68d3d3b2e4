"""Hooks: functions around modules' forwards for the length of a `with`, and away again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

Forward = Callable[..., Any]
Around = Callable[..., Any]  # around(forward, *args, **kwargs): what the module shall return
StandIn = Callable[[Forward, tuple, dict], Any]  # stand_in(forward, args, kwargs): likewise


class Hook(NamedTuple):
    """A function to run around a module's forward, or another method."""

    module: nn.Module
    around: Around
    method: str = "forward"


class HookRegistry:
    """Functions to run around the forwards of modules.

        hook = Hook(block, lambda forward, *args, **kwargs: forward(*args, **kwargs))
        with HookRegistry([hook]):
            model(latent)

    Inside the `with`, the module instances carry a stand-in for `forward`; of two functions on one module the one added
    last runs first. On the way out, exception or not, every instance is as it was before. A patch that someone else put
    on top meanwhile stays, and then finds the module's own forward behind it.
    """

    def __init__(self, hooks: Iterable[Hook] = ()) -> None:
        self._hooks = list(hooks)
        self._installed: list[_Installed] = []

    def add(self, module: nn.Module, around: Around, method: str = "forward") -> None:
        """Run `around(forward, *args, **kwargs)` in place of the module's forward, or of another method."""
        self._hooks.append(Hook(module, around, method))

    def __enter__(self) -> HookRegistry:
        try:
            for module, around, method in self._hooks:
                self._installed.append(_Installed(module, around, method))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._installed:
            self._installed.pop().uninstall()


def handing_over(stand_in: StandIn, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
    """Around a forward: what is handed all arguments at once."""
    return stand_in(forward, args, kwargs)


def collecting(ran: set[nn.Module], module: nn.Module, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
    """A module's forward, and the module is in the set of those that ran."""
    ran.add(module)
    return forward(*args, **kwargs)


@torch._disable_dynamo
def unseen(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that must not be compiled, nor what it calls."""
    return function(*args, **kwargs)


class _Installed:
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
