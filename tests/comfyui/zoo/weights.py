"""Random weights under which a tiny model behaves as trained ones do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random weights that let features neither fade nor grow: ComfyUI leaves them uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if isinstance(tensor, nn.Parameter) or not torch.isfinite(tensor).all():
            last = name.rpartition(".")[2]
            if tensor.ndim >= 2 and last == "weight":
                tensor.data.normal_(0, 0.8 * tensor[0].numel() ** -0.5, generator=generator)
            elif tensor.ndim >= 2:  # tables, tokens, raw modulation
                tensor.data.normal_(0, 0.3, generator=generator)
            elif last == "bias":
                tensor.data.normal_(0, 0.1, generator=generator)
            else:
                tensor.data.normal_(1, 0.1, generator=generator)


def steady(time: str, *gates: str, heard: float = 0.3) -> Callable[[nn.Module], None]:
    """A `prepare`: the model changes slowly from step to step, as trained ones do, and its blocks count for much.

    Of the timestep's waves only the slowest are `heard` by the layer `time`: they turn less than once in a schedule.
    Layers with `gates` in their names have wide gates.
    """

    def prepare(model: nn.Module) -> None:
        waves = model.get_submodule(time).weight.data.unflatten(1, (2, -1))  # sines and cosines, the fastest first
        waves[..., : round((1 - heard) * waves.shape[-1])] = 0
        waves *= heard**-0.5
        with_wide_gates(*gates)(model)

    return prepare


def with_wide_gates(*names: str) -> Callable[[nn.Module], None]:
    """A `prepare`: the layers of these names give numbers near 1, not near 0.1, to what they shift, scale and gate."""

    def prepare(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.data *= 6

    return prepare


def set_buffers(model: nn.Module) -> None:
    """A `prepare`: frequencies and biases that ComfyUI takes from the checkpoint are what they are in real ones."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(10000.0 ** -torch.linspace(0, 1, len(buffer)))
        elif name.endswith("beta"):
            buffer.zero_()
