"""The demo without ComfyUI: diffusers' Flux, the same weights, Euler steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..adapters.diffusers import apply, cache_context
from ..compare.side_by_side import Sampled
from ..strategy.strategy import Strategy
from . import codec, sampling
from .methods import GUIDANCE, Method, Sample
from .still_life import SIZE


@contextmanager
def sampler() -> Iterator[Sample]:
    """Makes the demo's pictures, inside a `with`."""
    transformer, vae = sampling.load_transformer(), codec.load_vae()

    def sample(method: Method, prompt: str, seed: int) -> Sampled:
        noise, sigmas = sampling.noise(seed, SIZE), sampling.flow_sigmas(method.steps)
        began = time.perf_counter()
        latent, share = denoised(transformer, method.strategy, [prompt], noise, sigmas)
        seconds = time.perf_counter() - began
        return method.sampled(codec.decode_with_vae(vae, latent)[0], share, seconds)

    yield sample


def denoised(
    transformer: torch.nn.Module,
    strategy: Strategy | None,
    prompts: Sequence[str],
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    guidance: float = GUIDANCE,
    velocity: sampling.Velocity = sampling.velocity,
) -> tuple[torch.Tensor, float]:
    """The finished latents, of the noise's shape, and the share of the blocks that were computed for them."""
    predict = partial(sampling.GuidedPrediction, transformer, prompts, guidance, velocity=velocity)
    if strategy is None or strategy.is_off:
        return sampling.denoise(predict(), noise, sigmas), 1.0
    with apply(transformer, strategy, scheduler=_scheduler(sigmas)) as handle:
        latents = sampling.denoise(predict(call_context=partial(cache_context, transformer)), noise, sigmas)
        return latents, handle.report.computed_share


def _scheduler(sigmas: torch.Tensor) -> Any:
    """diffusers' scheduler of a run along these sigmas, from 1 to 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    return scheduler
