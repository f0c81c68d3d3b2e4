"""FasterCache estimates the negative prompt on packed latents too, where the model is told their rows and columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import FLUX, FLUX2, LTX, QWEN_IMAGE, TEXT_TOKENS, TEXT_WIDTH, Clock, denoise, diffusers, flow_match, made
from test_better import relative_error

from cache_core.adapters.diffusers import apply
from cache_core.adapters.diffusers.arguments import Arguments
from cache_core.adapters.diffusers.grids import grid_of, on_grid
from cache_core.strategies.faster_cache import FasterCache

ESTIMATES = FasterCache(
    spatial_attention_block_skip_range=1, unconditional_batch_skip_range=5, unconditional_batch_timestep_skip_end=901
)
PACKED = [replace(FLUX, branches="apart"), replace(FLUX2, branches="apart"), QWEN_IMAGE, LTX]
each_packed = pytest.mark.parametrize("denoiser", PACKED, ids=lambda denoiser: denoiser.name)


def sampled(denoiser, strategy, steps=20, scheduler=None):
    """The final latent, and the report."""
    model = made(denoiser)
    handle = apply(model, strategy, scheduler=scheduler) if strategy else None
    denoiser = replace(denoiser, scheduler=lambda: scheduler) if scheduler else denoiser
    return denoise(denoiser, model, Clock(), steps=steps), handle and handle.report


@each_packed
@pytest.mark.parametrize("pass_scheduler", [True, False], ids=["scheduler", "no-scheduler"])
def test_the_negative_prompt_is_estimated_on_packed_latents(denoiser, pass_scheduler):
    """It was computed in each of the 20 steps."""
    exact, _ = sampled(denoiser, None)
    latent, report = sampled(denoiser, ESTIMATES, scheduler=denoiser.scheduler() if pass_scheduler else None)
    estimated = [call for call in report.calls if "uncond" in call.branches and call.action != "computed"]
    assert len(estimated) >= 10 and not any("not estimated" in note for note in report.notes)
    most = 1 if pass_scheduler else 2  # without it, skipped steps are not bounded by their noise
    assert 0 < relative_error(latent, exact) < most * relative_error(sampled(denoiser, None, steps=13)[0], exact)


def told(denoiser, tokens, **changed):
    text = torch.ones(1, TEXT_TOKENS, TEXT_WIDTH)
    inputs = denoiser.inputs(torch.zeros(1, tokens, 4), text, torch.tensor([500.0])) | changed
    return Arguments((), inputs, inputs)


def test_what_a_call_is_told_is_the_shape_of_its_tokens():
    assert [grid_of(told(each, each.latent[1])) for each in PACKED] == [(1, 6, 6)] * 3 + [(2, 4, 4)]


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: told(FLUX, 36, img_ids=told(FLUX, 36).named["img_ids"].flip(0)),
        lambda: told(FLUX, 72, img_ids=told(FLUX, 36).named["img_ids"].repeat(2, 1)),
        lambda: told(QWEN_IMAGE, 72, img_shapes=[[(1, 6, 6), (1, 6, 6)]]),
        lambda: told(QWEN_IMAGE, 52, img_shapes=[[(1, 6, 6), (1, 4, 4)]]),
        lambda: told(LTX, 33),
        lambda: told(LTX, 32, height=None),
    ],
    ids=["another order", "two pictures by ids", "two pictures", "two sizes", "more tokens", "no height"],
)
def test_tokens_that_are_not_one_picture_are_left_as_they_are(arguments):
    assert grid_of(arguments()) is None


def test_tokens_come_back_as_they_were():
    tokens, seen = torch.randn(2, 32, 5), []

    def guide(predict):
        given, without = predict(True, True)
        seen.append(given.shape)
        return given, without

    for found in on_grid((2, 4, 4), guide, lambda *_: (tokens, tokens)):
        assert torch.equal(found, tokens)
    assert seen == [(2, 5, 2, 4, 4)]


def test_off_is_off_on_packed_latents():
    off = FasterCache(spatial_attention_block_skip_range=1, unconditional_batch_skip_range=1)
    assert torch.equal(sampled(PACKED[0], off, steps=6)[0], sampled(PACKED[0], None, steps=6)[0])


def test_z_image_is_computed_and_said():
    """Its pipeline joins both prompts in lists, the prompt first, and names no branches."""
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    ).eval()
    scheduler, draw = flow_match(), torch.Generator().manual_seed(1)
    handle = apply(model, FasterCache(unconditional_batch_timestep_skip_end=901), scheduler=scheduler)
    latent, texts = torch.randn(4, 1, 8, 8, generator=draw), [torch.randn(6, TEXT_WIDTH, generator=draw)] * 2
    scheduler.set_timesteps(12)
    for t in scheduler.timesteps:
        given, without = model([latent, latent], (1 - t / 1000).expand(2), texts, return_dict=False)[0]
        latent = scheduler.step(-(without + 3 * (given - without)), t, latent, return_dict=False)[0]
    assert any("the negative prompt is not estimated: the model gives more than one" in n for n in handle.report.notes)
    assert len(handle.report.calls) == 12 and handle.report.count("reused", "forecast") >= 2  # attention
