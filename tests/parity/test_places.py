"""Another latent at the same timestep and prompt, in loops of diffusers: it is not given what another one was."""

import pytest
import torch
from models import TEXT_TOKENS, TEXT_WIDTH, WAN, flow_match, made

from cache_core.adapters.diffusers import apply
from cache_core.run.going_on import ANOTHER_LATENT
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

TRUSTING = [
    TaylorSeerCache(cache_interval=3),
    TaylorSeerCache(cache_interval=3, cache_level="block"),
    PyramidAttentionBroadcast(spatial_attention_timestep_skip_end=1001),
]
OFF = [
    FirstBlockCache(residual_diff_threshold=0.0),
    TaylorSeerCache(cache_interval=1),
    PyramidAttentionBroadcast(spatial_attention_block_skip_range=1),
    FasterCache(spatial_attention_block_skip_range=1, unconditional_batch_skip_range=1),
]
each_strategy = pytest.mark.parametrize(
    "strategy", TRUSTING, ids=lambda s: f"{s.title} {getattr(s, 'cache_level', '')}"
)


def noise(seed):
    return torch.randn(WAN.latent, generator=torch.Generator().manual_seed(seed))


def side_by_side(strategy, seeds, steps=10):
    """The latents of some seeds, each stepped in turn, and the report."""
    model, text = made(WAN), torch.ones(1, TEXT_TOKENS, TEXT_WIDTH)
    schedulers = [flow_match() for _ in seeds]
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    handle = None if strategy is None else apply(model, strategy)
    latents = [noise(seed) for seed in seeds]
    for t in schedulers[0].timesteps:
        for index, scheduler in enumerate(schedulers):
            prediction = model(latents[index], t.expand(1), text, return_dict=False)[0]
            latents[index] = scheduler.step(prediction, t, latents[index], return_dict=False)[0]
    return latents, handle and handle.report


@each_strategy
@pytest.mark.parametrize("seeds", [(1, 2), (1, 2, 3)], ids=["two", "three"])
def test_pictures_stepped_in_turns_are_each_what_they_are_alone(strategy, seeds):
    """Two had an error of 1.255."""
    plain, _ = side_by_side(None, seeds)
    latents, report = side_by_side(strategy, seeds)
    for latent, alone in zip(latents, plain):
        assert ((latent - alone).norm() / alone.norm()).item() < 0.01
    assert ANOTHER_LATENT in report.notes


@each_strategy
def test_one_picture_is_reused(strategy):
    (plain,), (latents, report) = side_by_side(None, (1,))[0], side_by_side(strategy, (1,))
    assert report.count("reused", "forecast") >= 4 and ANOTHER_LATENT not in report.notes
    assert ((latents[0] - plain).norm() / plain.norm()).item() < 0.1


@each_strategy
@pytest.mark.parametrize("passes", [{}, {"scheduler": True}], ids=["open", "scheduler"])
def test_a_loop_of_one_step_gives_each_seed_its_own_output(strategy, passes):
    """The third output was the first's."""
    model, text, scheduler = made(WAN), torch.ones(1, TEXT_TOKENS, TEXT_WIDTH), flow_match()
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0].expand(1)
    plain = [model(noise(seed), t, text, return_dict=False)[0] for seed in range(5)]
    apply(model, strategy, scheduler=scheduler if passes else None)
    for seed, own in enumerate(plain):
        assert torch.allclose(model(noise(seed), t, text, return_dict=False)[0], own, atol=1e-6)


@pytest.mark.parametrize("strategy", OFF, ids=lambda strategy: strategy.title)
@pytest.mark.parametrize("seeds", [(1,), (1, 2)], ids=["one", "in turns"])
def test_off_is_off(strategy, seeds):
    plain, _ = side_by_side(None, seeds)
    latents, _ = side_by_side(strategy, seeds)
    assert all(map(torch.equal, latents, plain))
