"""The zoo: a tiny instance of every diffusion transformer that ComfyUI has, built by ComfyUI's own code.

One file holds one family; `ARCHITECTURES` of all of them is what `test_zoo.py` runs. ComfyUI must be importable.
"""

from __future__ import annotations

import importlib
import pkgutil

from .architecture import Architecture


def all_architectures() -> list[Architecture]:
    """Every architecture, in the order of the families' files."""
    families = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return [architecture for family in families for architecture in getattr(family, "ARCHITECTURES", ())]
