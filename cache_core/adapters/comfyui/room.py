"""How much a cache may hold beside a model, by ComfyUI's own account of its memory, and what ComfyUI is told of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from comfy import model_management

from ...strategy.lane import AWAY_SHARE
from .seams import MOVED, ModelPatcher, otherwise, wrapper_type

logger = logging.getLogger(__name__)

NOBODY_KNOWS = "how much memory is free is not known, so only memory_limit_gb limits what a cache holds"
LEAST_SHARE = 0.25  # of what is free: what ComfyUI expects a model to need is mostly more than it takes


class Room:
    """What sampling runs of one cached MODEL have held: the next one of such latents has room for as much.

    ComfyUI then keeps that many bytes more free when it loads the run's models, as with its `--reserve-vram`: other
    models make way, and where that is not enough, weights of this one stay off the device. A first run takes what is
    free.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, ...], int] = {}  # by the latents' shape

    def beside(
        self, model: ModelPatcher, noise_shape: Sequence[int], options: dict[str, Any]
    ) -> Callable[[torch.device], float | None]:
        """See `free_beside`. `options` are the run's own transformer options."""
        told = self._held.get(tuple(noise_shape), 0)
        kind = wrapper_type("PREPARE_SAMPLING") if hasattr(model_management, "EXTRA_RESERVED_VRAM") else None
        if told and kind:
            wrappers = options.get("wrappers", {})
            own = {"refrain": [partial(_keep_free, told)]}
            options["wrappers"] = wrappers | {kind: wrappers.get(kind, {}) | own}
        return partial(free_beside, model, noise_shape, told=told)

    def remember(self, noise_shape: Sequence[int], held: int) -> None:
        """A run of such latents has reserved so many bytes at most."""
        self._held[tuple(noise_shape)] = held


def _keep_free(told: int, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the loading of a run's models: prepare_sampling(model, noise_shape, conds, ...)."""
    before = model_management.EXTRA_RESERVED_VRAM
    model_management.EXTRA_RESERVED_VRAM = before + told
    try:
        return executor(*args, **kwargs)
    finally:
        model_management.EXTRA_RESERVED_VRAM = before


def _if_known(free: Callable[..., float | None]) -> Callable[..., float | None]:
    """The same; None, which is no limit, where ComfyUI does not tell."""

    @wraps(free)
    def known(*args: Any, **kwargs: Any) -> float | None:
        try:
            return free(*args, **kwargs)
        except MOVED as error:
            logger.warning("Refrain: %s", otherwise(NOBODY_KNOWS, error))
            return None

    return known


@_if_known
def free_beside(model: ModelPatcher, noise_shape: Sequence[int], device: torch.device, told: int = 0) -> float:
    """Bytes that a cache may take on this device while the model is sampled from. Asked before its first call.

    What ComfyUI expects the model to need for such latents, (pictures, ...), stays free; that is for one prompt at a
    time, as ComfyUI joins prompts only where there is memory for it. So does its reserve for other programs. Weights
    that it fetches as they are used give way to whatever needs their place, so they count as free. ComfyUI was `told`
    to keep so many bytes free for the cache.
    """
    loaded = [entry for entry in model_management.current_loaded_models if entry.device == device]
    yielding = sum(entry.model.loaded_size() for entry in loaded if _is_dynamic(entry.model))
    free = model_management.get_free_memory(device) + yielding - getattr(model_management, "EXTRA_RESERVED_VRAM", 0)
    return max(free - model.model.memory_required(list(noise_shape)), LEAST_SHARE * (free - told), 0.0)


@_if_known
def free_away(device: torch.device) -> float | None:
    """Bytes that a cache may take in main memory instead of on this device; None where that is no CUDA."""
    return AWAY_SHARE * model_management.get_free_memory(torch.device("cpu")) if device.type == "cuda" else None


def _is_dynamic(model: ModelPatcher) -> bool:
    """Whether its weights are fetched as they are used; ComfyUI 0.8 has no such models."""
    return hasattr(model, "is_dynamic") and model.is_dynamic()
