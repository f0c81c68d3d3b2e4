"""Samples the same picture again and again, as the KSampler node does, by the clock and on one progress bar."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy.sd import VAE
from torch import Tensor

from .seams import ModelPatcher
from .wrappers import take_off

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of an empty latent; ComfyUI 0.8 has none
_BAR = 1000  # parts of the progress bar
NO_PICTURES = "The VAE makes no pictures of these latents. Compare models of pictures or videos, with their own VAE."


@dataclass(frozen=True)
class SamplerInputs:
    """The inputs of a KSampler, but for the model and the number of steps."""

    seed: int
    cfg: float
    sampler_name: str
    scheduler: str
    positive: list
    negative: list
    latent_image: dict[str, Any]
    denoise: float = 1.0


class TimedSamples(NamedTuple):
    """What a sampling run made, on the CPU, and how long it took."""

    samples: Any
    seconds: float


class Rounds:
    """Sampling runs that share a progress bar. A cancel ends them with ComfyUI's own exception."""

    def __init__(self, model: ModelPatcher, inputs: SamplerInputs) -> None:
        self._inputs, self._expected, self._done = inputs, 1, 0  # steps
        self._before = 0.0  # 0..1 of the bar, which was passed before those
        self._bar = comfy.utils.ProgressBar(_BAR)
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def load(self, models: Sequence[ModelPatcher], steps: int) -> None:
        """Bring these models' weights to the device: one step with each, thrown away."""
        loaded: list[ModelPatcher] = []
        for model in models:
            if not any(have_the_same_weights(model, other) for other in loaded):
                self._sample(_without_cache(model), steps, last_step=1)
                loaded.append(model)

    def expect(self, steps: int) -> None:
        """There are so many steps to come, as is known now. The bar goes on from where it is."""
        self._before, self._expected, self._done = self._passed(self._done), steps, 0

    def finish(self) -> None:
        """Nothing is to come."""
        self._bar.update_absolute(_BAR, _BAR)

    def run(self, model: ModelPatcher, steps: int, seed: int | None = None) -> TimedSamples:
        """One sampling run, of the inputs' seed or another."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self._sample(model, steps, seed=seed)

    def _sample(
        self, model: ModelPatcher, steps: int, last_step: int | None = None, seed: int | None = None
    ) -> TimedSamples:
        inputs = self._inputs if seed is None else replace(self._inputs, seed=seed)
        latent = _latent_for(model, inputs.latent_image)
        noise = comfy.sample.prepare_noise(latent, inputs.seed, inputs.latent_image.get("batch_index"))
        planned = steps if last_step is None else last_step
        began = time.perf_counter()
        samples = comfy.sample.sample(
            model, noise, steps, inputs.cfg, inputs.sampler_name, inputs.scheduler, inputs.positive, inputs.negative,
            latent, denoise=inputs.denoise, last_step=last_step, noise_mask=inputs.latent_image.get("noise_mask"),
            callback=self._progress(planned), disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=inputs.seed,
        ).cpu()  # waits for the device  # fmt: skip
        seconds = time.perf_counter() - began
        self._done += planned
        return TimedSamples(samples, seconds)

    def _progress(self, steps: int) -> Any:
        def after_step(step: int, denoised: Any, latent: Any, total: int) -> None:
            preview = None
            if self._previewer:
                first = denoised.unbind()[0] if denoised.is_nested else denoised
                preview = self._previewer.decode_latent_to_preview_image("JPEG", first)
            passed = self._passed(self._done + (step + 1) * steps / total)
            self._bar.update_absolute(round(_BAR * passed), _BAR, preview)

        return after_step

    def _passed(self, steps: float) -> float:
        return self._before + (1 - self._before) * min(1.0, steps / self._expected)


class Pictures(Sequence):
    """What a VAE made, as it gave it; picture by picture (3, height, width) in 0..1. NaN is black, as when saved."""

    def __init__(self, made: Tensor) -> None:
        self.made = made  # (pictures or frames, height, width, channels)

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> Tensor:
        return self.made[index, ..., :3].movedim(-1, 0).float().nan_to_num(0.0).clamp(0, 1).cpu().contiguous()


def decoded(vae: VAE, samples: Any) -> Pictures:
    """What VAE Decode makes of samples. Raises ValueError if that is no picture."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    pictures = vae.decode(samples.unbind()[0] if samples.is_nested else samples)
    if pictures.ndim == 5:  # (videos, frames, height, width, channels)
        pictures = pictures.flatten(0, 1)
    if pictures.ndim != 4 or pictures.shape[-1] < 3:
        raise ValueError(NO_PICTURES)
    return Pictures(pictures)


def is_video(samples: Any) -> bool:
    """Whether samples have frames: (videos, channels, frames, height, width)."""
    first = samples.unbind()[0] if samples.is_nested else samples
    return first.ndim == 5 and first.shape[2] > 1


def _latent_for(model: ModelPatcher, latent: dict[str, Any]) -> Any:
    fix = comfy.sample.fix_empty_latent_channels
    known = inspect.signature(fix).parameters
    return fix(model, latent["samples"], **{name: latent.get(name) for name in RATIOS if name in known})


def have_the_same_weights(model: ModelPatcher, other: ModelPatcher) -> bool:
    """Whether two MODELs are clones of one, with the same LoRAs."""
    return model.model is other.model and model.patches_uuid == other.patches_uuid


def _without_cache(model: ModelPatcher) -> ModelPatcher:
    bare = model.clone()
    take_off(bare)
    return bare
