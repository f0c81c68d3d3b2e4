"""FasterCache as diffusers 0.42.1 does it (arXiv 2410.19355).

Two halves. Inside a window of timesteps the model runs on the conditional half of the batch only, and the unconditional
prediction is made of it and of how far apart the two were in frequency. And attentions are extrapolated from their last
two outputs, wherever the unconditional half is left out or there is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.hooks import FasterCacheConfig
from diffusers.hooks._common import _ATTENTION_CLASSES
from diffusers.hooks.faster_cache import _TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks.hooks import CacheContext
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .parts import run_with

FORMATS = ("BCFHW", "BFCHW", "BCHW")  # batch, channels, frames, height, width


@dataclass
class Guidance:
    """How far the unconditional prediction is from the conditional one, by frequency, and how often the model ran."""

    calls: int = 0
    low: Tensor | None = None  # complex, (batch * frames, channels, height, width)
    high: Tensor | None = None


@dataclass
class Attention:
    """One attention module: how often it runs where, and its last two outputs, of the conditional half only."""

    interval: int
    window: tuple[float, float]  # timesteps, both ends excluded
    calls: int = 0
    batch: int | None = None  # of the first call: both halves
    outputs: tuple[Any, Any] | None = None  # older, newer: (batch, tokens, channels), or tuples of image and text


class FasterCache:
    """Leaves out the unconditional half, and extrapolates attentions. Calls are counted whatever branch they are of."""

    def __init__(self, model: nn.Module, config: FasterCacheConfig) -> None:
        if config.tensor_format not in FORMATS:
            raise ValueError(
                f"FasterCache: tensor_format is {config.tensor_format!r}. Choose one of: {', '.join(FORMATS)}."
            )
        self.model, self.config = model, replace(config)
        self.plan = {module: found for name, module in model.named_modules() if (found := _rule(name, module, config))}
        self.guidance = Guidance()
        self.attentions: dict[nn.Module, Attention] = {}
        self.reset()

    def call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: CacheContext | None
    ) -> Any:
        """One pass of the model, on both halves of the batch or on the conditional half."""
        guidance, config = self.guidance, self.config
        is_halved = (
            _is_inside(config.unconditional_batch_timestep_skip_range, config.current_timestep_callback)
            and guidance.calls > 0
            and guidance.calls % config.unconditional_batch_skip_range != 0
            and not config.is_guidance_distilled
        )
        halved_names = config._unconditional_conditional_input_kwargs_identifiers
        if is_halved and any(name in halved_names for name in kwargs):
            args = tuple(_second_half(value) if torch.is_tensor(value) else value for value in args)
            kwargs = {name: _second_half(value) if name in halved_names else value for name, value in kwargs.items()}
        arounds = {
            module: partial(self._around_attention, attention, module) for module, attention in self.attentions.items()
        }
        output = run_with(arounds, self.model, forward, args, kwargs)
        if not config.is_guidance_distilled:
            output = self._guided(output, is_halved)
        guidance.calls += 1
        return output

    def reset(self) -> None:
        """Forget everything and count from zero."""
        self.guidance = Guidance()
        self.attentions = {module: Attention(interval, window) for module, (interval, window) in self.plan.items()}

    def _guided(self, output: Any, is_halved: bool) -> Any:
        """The output for both halves, and what is to be remembered of it."""
        if torch.is_tensor(output):
            return self._both_halves(output) if is_halved else self._remember(output)
        if not isinstance(output, (tuple, Transformer2DModelOutput)):
            raise TypeError(
                f"FasterCache cannot read what {type(self.model).__name__} returns: {type(output).__name__}."
            )
        prediction = self._both_halves(output[0]) if is_halved else self._remember(output[0])
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        output.sample = prediction
        return output

    def _remember(self, prediction: Tensor) -> Tensor:
        """Keep the difference between the halves of a full prediction."""
        without, given = (_spectrum(_frames(half, self.config.tensor_format)) for half in prediction.chunk(2, dim=0))
        self.guidance.low, self.guidance.high = without[0] - given[0], without[1] - given[1]
        return prediction

    def _both_halves(self, given: Tensor) -> Tensor:
        """The unconditional prediction made of the conditional one, and that one. The weights compound (W16)."""
        guidance, config = self.guidance, self.config
        guidance.low = guidance.low * self._low_weight()
        guidance.high = guidance.high * self._high_weight()
        low, high = _spectrum(_frames(given, config.tensor_format))
        spectrum = (guidance.low + low) + (guidance.high + high)
        frames = torch.fft.ifft2(torch.fft.ifftshift(spectrum)).real
        without = _from_frames(frames, config.tensor_format, given.size(0))
        return torch.cat([without.to(given.dtype), given], dim=0)

    def _low_weight(self) -> float:
        config = self.config
        if config.low_frequency_weight_callback is not None:
            return config.low_frequency_weight_callback(self.model)
        is_inside = _is_inside(config.low_frequency_weight_update_timestep_range, config.current_timestep_callback)
        return config.alpha_low_frequency if is_inside else 1.0

    def _high_weight(self) -> float:
        config = self.config
        if config.high_frequency_weight_callback is not None:
            return config.high_frequency_weight_callback(self.model)
        is_inside = _is_inside(config.high_frequency_weight_update_timestep_range, config.current_timestep_callback)
        return config.alpha_high_frequency if is_inside else 1.0

    def _attention_weight(self, module: nn.Module) -> float:
        callback = self.config.attention_weight_callback
        return 0.5 if callback is None else callback(module)  # 0.5: diffusers' default at all timesteps

    def _around_attention(
        self, attention: Attention, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        batch = next(value.size(0) for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        if attention.batch is None:
            attention.batch = batch
        is_due = attention.calls > 0 and attention.calls % attention.interval == 0
        is_inside = _is_inside(attention.window, self.config.current_timestep_callback)
        if is_inside and not is_due and (self.config.is_guidance_distilled or batch != attention.batch):
            output = self._extrapolated(attention, module, batch)
        else:
            output = forward(*args, **kwargs)
        newer = self._conditional(output, attention.batch)
        attention.outputs = (newer if attention.outputs is None else attention.outputs[1], newer)
        attention.calls += 1
        return output

    def _extrapolated(self, attention: Attention, module: nn.Module, batch: int) -> Any:
        """newer + (newer - older) * weight. Itself kept as the newest afterwards (W18)."""
        older, newer = attention.outputs  # a TypeError if the first call is inside the window already (W14)
        if torch.is_tensor(newer):
            return _continued(older, newer, self._attention_weight(module), batch)
        return tuple(_continued(*pair, self._attention_weight(module), batch) for pair in zip(older, newer))

    def _conditional(self, output: Any, both: int) -> Any:
        """An attention's output for the conditional half: a view, so that it holds the other half as well (W17)."""
        if not torch.is_tensor(output):
            return tuple(self._conditional(value, both) for value in output)
        is_both = not self.config.is_guidance_distilled and output.size(0) == both
        return output.chunk(2, dim=0)[1] if is_both else output  # an IndexError if a branch comes on its own (W15)


def _rule(name: str, module: nn.Module, config: FasterCacheConfig) -> tuple[int, tuple[float, float]] | None:
    """Interval and window of one module: the names of the config narrow a fixed list, spatial comes before temporal."""
    if not isinstance(module, _ATTENTION_CLASSES) or not _fits(_TRANSFORMER_BLOCK_IDENTIFIERS, name):
        return None
    spatial, temporal = config.spatial_attention_block_skip_range, config.temporal_attention_block_skip_range
    is_spatial = (
        spatial is not None
        and _fits(config.spatial_attention_block_identifiers, name)
        and not getattr(module, "is_cross_attention", False)
    )
    is_temporal = (
        temporal is not None
        and _fits(config.temporal_attention_block_identifiers, name)
        and not module.is_cross_attention
    )
    if is_spatial and config.spatial_attention_timestep_skip_range is not None:
        return spatial, config.spatial_attention_timestep_skip_range
    if is_temporal and not is_spatial and config.temporal_attention_timestep_skip_range is not None:
        return temporal, config.temporal_attention_timestep_skip_range
    return None


def _fits(identifiers: Sequence[str], name: str) -> bool:
    return any(re.search(identifier, name) for identifier in identifiers)


def _is_inside(window: tuple[float, float], timestep: Callable[[], Any]) -> bool:
    low, high = window
    return low < timestep() < high


def _second_half(value: Tensor) -> Tensor:
    _, second = value.chunk(2, dim=0)
    return second


def _continued(older: Tensor, newer: Tensor, weight: float, batch: int) -> Tensor:
    """One half each, extrapolated by `weight` times the last change."""
    if not {older.size(0), newer.size(0)} <= {batch, 2 * batch}:
        raise ValueError(f"FasterCache: a batch of {batch} follows one of {newer.size(0)}. Reset between runs.")
    older, newer = (value if value.size(0) == batch else value[batch:] for value in (older, newer))
    return newer + (newer - older) * weight


def _frames(prediction: Tensor, layout: str) -> Tensor:
    """(batch * frames, channels, height, width), float32."""
    if layout == "BCFHW":
        prediction = prediction.permute(0, 2, 1, 3, 4)
    return (prediction if layout == "BCHW" else prediction.flatten(0, 1)).float()


def _from_frames(frames: Tensor, layout: str, batch: int) -> Tensor:
    """Back into the prediction's own layout."""
    if layout == "BCHW":
        return frames
    prediction = frames.unflatten(0, (batch, -1))
    return prediction.permute(0, 2, 1, 3, 4) if layout == "BCFHW" else prediction


@torch.no_grad()
def _spectrum(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high frequencies, complex: inside and outside a disc of a fifth of the shorter side.

    Shifted along all axes, as in diffusers, not only along height and width.
    """
    spectrum = torch.fft.fftshift(torch.fft.fft2(frames))
    height, width = frames.shape[-2:]
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    is_low = (column - width // 2) ** 2 + (row - height // 2) ** 2 <= (min(height, width) // 5) ** 2
    is_low = is_low[None, None].to(frames.device)
    return spectrum * is_low, spectrum * ~is_low
