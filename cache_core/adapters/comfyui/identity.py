"""Which model a MODEL is, so that what was measured on it is found again: by its weights, LoRAs aside."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ...measured import Identity
from ...presets import OTHER
from .families import class_of, family_of
from .seams import ModelPatcher

READ, VALUES = 8, 64  # tensors, evenly spread over the model, and values of each: no file is read for it
PREFIX = "diffusion_model."
COMPILED = "_orig_mod."  # what torch.compile puts into names


def identity_of(model: ModelPatcher) -> Identity:
    """The same for all clones of a model, with whatever LoRAs, loaded or not. Reads a few values off the device."""
    named = sorted(((name.replace(COMPILED, ""), weight) for name, weight in _weights(model)), key=lambda each: each[0])
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in named:
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
    readable = [(name, weight) for name, weight in named if _is_readable(weight)]
    for name, weight in _spread(readable):
        digest.update(_as_loaded(model, name, weight).detach().flatten()[:VALUES].to("cpu", torch.float32).numpy())
    family = family_of(model)
    parameters = sum(weight.numel() for _, weight in named)
    named_family = class_of(model) if family == OTHER else family
    return Identity(named_family, len(named), parameters, digest.hexdigest(), _halfway(model))


def device_of(model: ModelPatcher) -> str:
    """What it samples on, in words."""
    device = model.load_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _weights(model: ModelPatcher) -> Sequence[tuple[str, Tensor]]:
    network = getattr(model.model, "diffusion_model", None)
    return list(network.named_parameters()) if isinstance(network, torch.nn.Module) else []


def _is_readable(weight: Tensor) -> bool:
    """Whether its values are numbers, here: not packed by a quantisation, nor still in a file."""
    is_plain = type(weight) in (Tensor, torch.nn.Parameter)
    return is_plain and weight.is_floating_point() and weight.device.type != "meta"


def _spread(named: Sequence[tuple[str, Tensor]]) -> Sequence[tuple[str, Tensor]]:
    return [named[len(named) * index // READ] for index in range(READ)] if len(named) > READ else named


def _as_loaded(model: ModelPatcher, name: str, weight: Tensor) -> Tensor:
    """A weight without the LoRA that is baked into it now: ComfyUI keeps what was there before."""
    before = getattr(model, "backup", {}).get(PREFIX + name)
    return weight if before is None else getattr(before, "weight", weight)


def _halfway(model: ModelPatcher) -> float:
    """The sigma at half of the sampling, to four digits; 0 where that is not known."""
    sampling = model.get_model_object("model_sampling")
    sigma = sampling.percent_to_sigma(0.5) if hasattr(sampling, "percent_to_sigma") else 0.0
    return float(f"{float(sigma):.4g}")
