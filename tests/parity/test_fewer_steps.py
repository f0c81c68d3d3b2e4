"""TaylorSeer against fewer steps on Chroma and Lumina2: what an untrained model allows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import CHROMA, TEXT_TOKENS, TEXT_WIDTH, Denoiser, diffusers, made, tiny
from test_main_stream import _chroma

from cache_core.adapters.diffusers import apply
from cache_core.strategies.taylorseer import TaylorSeerCache

PICTURES = 8


def _lumina2():
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        norm_eps=1e-5,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=TEXT_WIDTH,
    )


def _counting_up(latent, text, timestep):  # as Lumina2's pipeline: 0 is noise
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    return dict(
        hidden_states=latent, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=1 - timestep / 1000
    )


LUMINA2 = Denoiser("Lumina2", _lumina2, (PICTURES, 4, 8, 8), _counting_up)
WIDE = replace(
    CHROMA,
    inputs=_chroma,
    latent=(4, 36, 4),
    model=tiny(
        "ChromaTransformer2DModel",
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=64,  # as the real one: 16 of them are the time's
        approximator_hidden_dim=16,
        approximator_layers=1,
    ),
)


def without_fast_times(model):
    """The guidance embedder hears only what turns at most once in the whole run, as it does once it is trained."""
    weight, count = model.distilled_guidance_layer.in_proj.weight, 8
    for index in range(count):
        if 1000 * math.exp(-math.log(10000) * index / count) > 2 * math.pi:
            weight[:, [index, count + index]] = 0  # its cosine and its sine
    return model


def sampled(denoiser, model, steps, strategy=None):
    """The final latents of the pictures, guided; the share of an output that changes in a step; the report."""
    random, scheduler = torch.Generator().manual_seed(1), diffusers.FlowMatchEulerDiscreteScheduler()
    text = torch.randn(2, 1, TEXT_TOKENS, TEXT_WIDTH, generator=random).expand(-1, len_of(denoiser), -1, -1)
    latent = torch.randn(denoiser.latent, generator=random)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    handle, before, changes = strategy and apply(model, strategy, scheduler=scheduler), None, []
    for t in scheduler.timesteps:
        given, without = (
            model(**denoiser.inputs(latent, each, t.expand(len(latent))), return_dict=False)[0]
            for each in (text[1], text[0])
        )
        prediction = without + 4 * (given - without)
        if denoiser is LUMINA2:
            prediction = -prediction
        if before is not None:
            changes.append(((prediction - before).norm() / before.norm()).item())
        before, latent = prediction, scheduler.step(prediction, t, latent, return_dict=False)[0]
    if handle:
        handle.remove()
    return latent, max(changes), handle and handle.report


def len_of(denoiser):
    return denoiser.latent[0]


def compared(denoiser, model, steps, fewer):
    """For each picture how much closer TaylorSeer is than fewer steps, which compute as much; the change in a step."""
    exact, change, _ = sampled(denoiser, model, steps)
    ours, _, report = sampled(denoiser, model, steps, TaylorSeerCache(cache_interval=4))
    assert report.count("computed") <= 2 * fewer < report.count("reused", "forecast") + 4
    errors = [(found - exact).flatten(1).norm(dim=1) for found in (sampled(denoiser, model, fewer)[0], ours)]
    return errors[0] / errors[1], change


@pytest.mark.parametrize("steps, fewer", [(12, 5), (24, 8)])
def test_taylorseer_beats_fewer_steps_on_lumina2(steps, fewer):
    """It lost on one picture of four tokens, by chance."""
    closer, _ = compared(LUMINA2, made(LUMINA2), steps, fewer)
    assert (closer > 1).sum() >= PICTURES - 1 and closer.log().mean().exp() > 1.1


@pytest.mark.parametrize("steps, fewer", [(12, 5), (20, 7)])
def test_taylorseer_beats_fewer_steps_on_chroma_that_moves_smoothly(steps, fewer):
    """Untrained it answers to the fastest waves of the time's embedding, which turn 13 times in each step."""
    closer, change = compared(WIDE, without_fast_times(made(WIDE)), steps, fewer)
    assert (closer > 1).all() and change < 0.12
    _, untrained = sampled(WIDE, made(WIDE), steps)[:2]
    assert untrained > 0.25
