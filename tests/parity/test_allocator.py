"""Memory that runs out at any one tensor that a cache makes, in a loop of diffusers, ends no run."""

from dataclasses import replace

import pytest
import torch
from failing_allocator import STEPS, check_every_failure, name_of
from models import GUIDANCE, TEXT_TOKENS, TEXT_WIDTH, WAN, WAN_SETTINGS, Clock, denoise, diffusers, made, tiny

from cache_core.adapters.diffusers import apply

SHORT = replace(WAN, model=tiny("WanTransformer3DModel", **WAN_SETTINGS | dict(num_layers=2)), latent=(1, 4, 1, 4, 4))


@pytest.mark.parametrize("branches", ["apart", "joined"])
@pytest.mark.parametrize("strategy", STEPS, ids=name_of)
def test_memory_that_runs_out_at_any_tensor_of_the_cache_ends_no_run(monkeypatch, strategy, branches):
    guidance = GUIDANCE if branches == "apart" else None
    model, denoiser, steps = made(SHORT), replace(SHORT, branches=branches), STEPS[strategy]

    def sample():
        scheduler = SHORT.scheduler()
        handle = apply(model, strategy, scheduler=scheduler)
        latent = denoise(replace(denoiser, scheduler=lambda: scheduler), model, Clock(), steps=steps)
        handle.remove()
        return latent, handle.report

    check_every_failure(sample, denoise(denoiser, model, Clock(), steps=steps), monkeypatch, guidance)


@pytest.mark.parametrize("strategy", [*STEPS][:2], ids=lambda strategy: strategy.title)
def test_memory_that_runs_out_where_a_timestep_is_a_copy_ends_no_run(monkeypatch, strategy):
    """With a scheduler that counts no steps it is read later, with what the strategy reads."""
    model, text, scheduler = made(SHORT), torch.ones(1, TEXT_TOKENS, TEXT_WIDTH), diffusers.DDPMScheduler()

    def sample(*strategies):
        scheduler.set_timesteps(5)
        handle = apply(model, *strategies, scheduler=scheduler) if strategies else None
        latent = torch.ones(SHORT.latent)
        for t in scheduler.timesteps:
            latent = latent - 0.2 * model(latent, t.clone().reshape(1), text, return_dict=False)[0]
        if handle is None:
            return latent
        handle.remove()
        return latent, handle.report

    check_every_failure(lambda: sample(strategy), sample(), monkeypatch)
