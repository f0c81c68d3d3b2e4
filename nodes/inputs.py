"""What reaches a node: ComfyUI lets NaN, constants in place of links, and outputs of any type pass for its inputs."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

from ..cache_core.strategy.strategy import Strategy


def _is_latent(value: Any) -> bool:
    return isinstance(value, dict) and hasattr(value.get("samples"), "unbind")  # a tensor, or several


def _is_conditioning(value: Any) -> bool:
    entries = value if isinstance(value, list) else [None]
    return all(isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in entries)


def _is_settings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, Strategy) for each in value)


LINKED: dict[str, tuple[Callable[[Any], bool], str]] = {  # how each is told, and where it comes from
    "MODEL": (
        lambda value: hasattr(value, "model_options"),
        "the model output of a loader, or of a node that changes its model",
    ),
    "VAE": (lambda value: hasattr(value, "decode"), "the vae output of a loader"),
    "LATENT": (_is_latent, "the output of a sampler or of an empty latent"),
    "CONDITIONING": (_is_conditioning, "the output of a text encoder"),
    "REFRAIN_SETTINGS": (_is_settings, "the output 'settings for another model' of a cache node or of Faster Sampling"),
}


def check_inputs(node: Any, /, **values: Any) -> None:
    """Raises ValueError, in words, for the first of a node's inputs that is not what its schema says."""
    schema = check_names(node, *values)
    for given in schema.inputs:
        value = values.get(given.id)
        if given.id not in values or (given.optional and value is None):
            continue
        if remedy := _remedy(given, value):
            raise ValueError(f"{schema.display_name}: {given.id} is {reprlib.repr(value)}. {remedy}.")


def check_names(node: Any, /, *names: str) -> Any:
    """Raises ValueError, in words, for the first that names no input of the node: ComfyUI lets links to such pass.
    Returns the node's schema.
    """
    schema = node.define_schema()
    known = [given.id for given in schema.inputs]
    for name in names:
        if name not in known:
            raise ValueError(f"{schema.display_name}: there is no input {name}. Its inputs are: {', '.join(known)}.")
    return schema


def _remedy(given: Any, value: Any) -> str:
    """What to do where a value does not fit an input; nothing where it does."""
    kind = given.get_io_type()
    if kind in LINKED:
        fits, source = LINKED[kind]
        return "" if fits(value) else f"It is no {kind}: connect {source}"
    if kind in ("INT", "FLOAT"):
        is_number = isinstance(value, int if kind == "INT" else (int, float)) and not isinstance(value, bool)
        fits = is_number and given.min <= value <= given.max  # NaN does not
        return "" if fits else f"Set it to a number between {given.min:g} and {given.max:g}"
    if kind == "COMBO":
        fits = isinstance(value, str) and value in given.options
        return "" if fits else "Choose one of its options"
    return ""
