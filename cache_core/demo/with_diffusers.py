"""The demo without ComfyUI: diffusers' Flux, the same weights, Euler steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import torch

from ..adapters.diffusers import apply, cache_context
from ..strategy.strategy import Strategy
from . import codec, sampling
from .comparison import Row
from .methods import GUIDANCE, STEPS, Method, Progress


def rows(methods: Sequence[Method], prompts: Sequence[str], progress: Progress) -> list[Row]:
    """One row for each method: picture by picture, prompt number n with seed n."""
    transformer, vae = sampling.load_transformer(), codec.load_vae()
    _latent(transformer, methods[0], prompts[0], seed=0)  # warm up: the first call is slower
    return [_row(transformer, vae, method, prompts, progress) for method in methods]


def _row(transformer, vae, method: Method, prompts: Sequence[str], progress: Progress) -> Row:
    latents, shares, began = [], [], time.perf_counter()
    for seed, prompt in enumerate(prompts):
        latent, share = _latent(transformer, method, prompt, seed)
        latents.append(latent)
        shares.append(share)
        progress()
    seconds = time.perf_counter() - began
    share = sum(shares) / len(shares)
    return Row(
        method.name,
        method.settings,
        codec.decode_with_vae(vae, torch.cat(latents)),
        share,
        seconds,
        speed_up_ideal=1 / share,
    )


def _latent(transformer, method: Method, prompt: str, seed: int) -> tuple[torch.Tensor, float]:
    """The finished latent, and the share of the uncached run's blocks that were computed for it."""
    sigmas = sampling.flow_sigmas(method.steps)
    latent, share = denoised(transformer, method.strategy, [prompt], sampling.noise(seed), sigmas)
    return latent, share * method.steps / STEPS


def denoised(
    transformer, strategy: Strategy | None, prompts: Sequence[str], noise: torch.Tensor, sigmas: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The finished latents (prompts, 16, h, w), and the share of the blocks that were computed for them."""
    predict = partial(sampling.GuidedPrediction, transformer, prompts, GUIDANCE)
    if strategy is None or strategy.is_off:
        return sampling.denoise(predict(), noise, sigmas), 1.0
    with apply(transformer, strategy, scheduler=SimpleNamespace(timesteps=sigmas[:-1])) as handle:
        latents = sampling.denoise(predict(call_context=partial(cache_context, transformer)), noise, sigmas)
        return latents, handle.report.computed_share
