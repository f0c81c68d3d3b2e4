"""The caching strategies, one file each. A file put here is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from ..strategy.strategy import Strategy


def all_strategies() -> list[type[Strategy]]:
    """Every strategy defined in this package, by title."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    classes = [
        item
        for module in modules
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Strategy) and item.__module__ == module.__name__
    ]
    return sorted(classes, key=lambda strategy: strategy.title)
