"""The zoo: a tiny instance of every diffusion transformer that ComfyUI has, built by ComfyUI's own code.

One file holds one family; `ARCHITECTURES` of all of them is what `test_zoo.py` runs. ComfyUI must be importable.
"""

from __future__ import annotations

from . import flux, pictures, pictures_joined, sound_and_shapes, unets, video, wan
from .architecture import Architecture

FAMILIES = (flux, pictures, pictures_joined, sound_and_shapes, unets, video, wan)


def all_architectures() -> list[Architecture]:
    """Every architecture, in the order of the families' files."""
    return [architecture for family in FAMILIES for architecture in family.ARCHITECTURES]
