"""Which run and branch a call belongs to in loops of diffusers that announce little, and what a run leaves behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import FLUX, SD3, STEPS, TEXT_TOKENS, TEXT_WIDTH, WAN, Clock, denoise, diffusers, flow_match, made
from test_better import tensors_held
from torch.overrides import TorchFunctionMode

from cache_core.adapters.diffusers import apply
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

BROADCAST = PyramidAttentionBroadcast(spatial_attention_timestep_skip_end=1001)
FORECAST = TaylorSeerCache(cache_interval=3)
FIRST_BLOCK = FirstBlockCache(residual_diff_threshold=0.3)


# The same conditioning in another tensor.


def with_prompts(prompt_of, strategy=FORECAST):
    """The report of a loop without contexts; `prompt_of(embeddings, row)` is called for each call of the model."""
    model, scheduler, random = made(WAN), flow_match(), torch.Generator().manual_seed(1)
    handle = apply(model, strategy, scheduler=scheduler)
    embeddings = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=random)
    latent = torch.randn(WAN.latent, generator=random)
    scheduler.set_timesteps(12)
    for t in scheduler.timesteps:
        given, without = (model(latent, t.expand(1), prompt_of(embeddings, row))[0] for row in (1, 0))
        latent = scheduler.step(without + 3 * (given - without), t, latent, return_dict=False)[0]
    return handle.report


@pytest.mark.parametrize("strategy", [FORECAST, BROADCAST, FIRST_BLOCK])
@pytest.mark.parametrize(
    "prompt_of",
    [
        lambda embeddings, row: embeddings[row : row + 1],
        lambda embeddings, row: embeddings.chunk(2)[row],
        lambda embeddings, row: embeddings[row].unsqueeze(0).expand(1, -1, -1),
    ],
    ids=["slice", "chunk", "expand"],
)
def test_a_prompt_sliced_in_the_loop_is_the_same_prompt(prompt_of, strategy):
    report = with_prompts(prompt_of, strategy)
    assert {branch for call in report.calls for branch in call.branches} == {"prompt 1", "prompt 2"}
    assert report.count("reused", "forecast") > 6 and len(report.calls) == 24


@pytest.mark.parametrize(
    "prompt_of",
    [
        lambda embeddings, row: embeddings[row : row + 1].clone(),
        lambda embeddings, row: embeddings[row : row + 1] * 1.0,
        lambda embeddings, row: embeddings.mul_(1.0)[row : row + 1],
    ],
    ids=["copy", "product", "written-in-place"],
)
def test_a_prompt_that_is_made_anew_at_every_step_is_computed_and_said(prompt_of):
    report = with_prompts(prompt_of)
    assert report.count("computed") == len(report.calls) >= 22
    assert any("the prompt is another tensor at every step" in note for note in report.notes)


# The end of a run.


def held_by(handle):
    return tensors_held(handle.engine._sampling)


@pytest.mark.parametrize("strategy", [BROADCAST, FORECAST, FIRST_BLOCK, FasterCache()])
@pytest.mark.parametrize("denoiser", [FLUX, WAN, SD3], ids=lambda denoiser: denoiser.name)
def test_with_the_scheduler_a_run_ends_with_its_last_step(denoiser, strategy):
    model, scheduler = made(denoiser), denoiser.scheduler()
    handle = apply(model, strategy, scheduler=scheduler)
    denoise(replace(denoiser, scheduler=lambda: scheduler), model, Clock(), seen=lambda *_: None)
    assert not held_by(handle)  # before the VAE decodes
    report = handle.report
    assert report.state == "finished" and len({call.evaluation for call in report.calls}) == STEPS
    assert report.count("reused", "forecast") > 0
    assert f"{report.speed_up:.2f}x" in report.line()


class Pipeline(diffusers.DiffusionPipeline):
    """A pipeline whose call only ends."""

    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)

    def __call__(self):
        self.maybe_free_model_hooks()


@pytest.mark.parametrize("denoiser", [SD3, FLUX], ids=lambda denoiser: denoiser.name)
def test_the_end_of_a_pipeline_ends_the_run_of_a_model_without_cache_mixin_too(denoiser):
    model = made(denoiser)
    own = dict(vars(model))
    handle, pipeline = apply(model, FORECAST), Pipeline(model)
    denoise(denoiser, model, Clock())
    assert held_by(handle) and handle.report.state == "running"
    pipeline()
    assert not held_by(handle) and handle.report.state == "finished" and handle.report.speed_up
    handle.remove()
    assert vars(model).keys() == own.keys()


def two_experts(strategy, with_scheduler=True):
    """Wan 2.2: the first expert works on the noisy half, the second on the rest. Handles, and bytes held by the first
    after each call of the second."""
    scheduler, held = WAN.scheduler(), []
    experts = [made(WAN), made(WAN)]
    handles = [apply(expert, strategy, scheduler=scheduler if with_scheduler else None) for expert in experts]
    random = torch.Generator().manual_seed(1)
    latent = torch.randn(WAN.latent, generator=random)
    text = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=random)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        second = t < 875
        prediction = experts[second](latent, t.expand(1), text, return_dict=False)[0]
        latent = scheduler.step(prediction, t, latent, return_dict=False)[0]
        if second:
            held.append(len(held_by(handles[0])))
    return handles, held


@pytest.mark.parametrize("strategy", [BROADCAST, FORECAST, FIRST_BLOCK])
def test_an_expert_that_another_has_followed_holds_nothing(strategy):
    (first, second), held = two_experts(strategy)
    assert len(held) > 8 and not any(held[2:])
    assert first.report.state == second.report.state == "finished"
    assert second.report.count("reused", "forecast") > 0 and first.report.count("computed") > 0


def test_two_models_that_take_turns_in_every_step_both_keep_what_they_have():
    scheduler, text = flow_match(), torch.ones(1, TEXT_TOKENS, TEXT_WIDTH)
    models = [made(WAN), made(WAN)]
    handles = [apply(model, FORECAST, scheduler=scheduler) for model in models]
    latent = torch.randn(WAN.latent, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(12)
    for t in scheduler.timesteps:
        one, other = (model(latent, t.expand(1), text, return_dict=False)[0] for model in models)
        latent = scheduler.step(one + 0.5 * (one - other), t, latent, return_dict=False)[0]
    for handle in handles:
        assert len(handle.report.calls) == 12 and handle.report.count("reused", "forecast") > 3


def test_a_call_more_in_the_last_step_does_not_begin_another_run():
    model, scheduler, texts = made(WAN), flow_match(), torch.ones(3, 1, TEXT_TOKENS, TEXT_WIDTH)
    handle = apply(model, FORECAST, scheduler=scheduler)
    scheduler.set_timesteps(8)
    for step, t in enumerate(scheduler.timesteps):
        for text in texts[: 2 + (step == 7)].unbind():  # perturbed guidance begins in the last step
            model(torch.zeros(WAN.latent), t.expand(1), text)
        scheduler.step(torch.zeros(WAN.latent), t, torch.zeros(WAN.latent))
    assert handle.report.state == "finished" and len(handle.report.calls) == 16


# Waiting for the device.


class CountingReads(TorchFunctionMode):
    """Counts the calls that make a number of a tensor, as often as a device would be waited for."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.reads += getattr(function, "__name__", "") in {"item", "tolist", "__float__", "__bool__", "equal"}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", [FIRST_BLOCK, FORECAST, BROADCAST], ids=lambda strategy: strategy.title)
@pytest.mark.parametrize("scheduler", [flow_match(), WAN.scheduler()], ids=lambda scheduler: type(scheduler).__name__)
def test_a_call_waits_once_at_most_where_the_scheduler_counts_its_steps(strategy, scheduler):
    model, text, reads = made(WAN), torch.ones(1, TEXT_TOKENS, TEXT_WIDTH), []
    handle = apply(model, strategy, scheduler=scheduler)
    latent = torch.randn(WAN.latent, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(12)
    for t in scheduler.timesteps:
        with CountingReads() as counting:
            prediction = model(latent, t.expand(1), text, return_dict=False)[0]
        reads.append(counting.reads)
        latent = scheduler.step(prediction, t, latent, return_dict=False)[0]
    assert handle.report.count("reused", "forecast") > 2
    assert max(reads[2:]) <= 1


def test_attention_that_no_step_to_come_may_reuse_is_not_kept():
    """The first expert of Wan 2.2 calls above timestep 875 only, and the window begins at 800."""
    scheduler, bytes_held = WAN.scheduler(), []
    model, text = made(WAN), torch.ones(1, TEXT_TOKENS, TEXT_WIDTH)
    handle = apply(model, PyramidAttentionBroadcast(), scheduler=scheduler)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        prediction = model(torch.ones(WAN.latent), t.expand(1), text, return_dict=False)[0]
        sampling = handle.engine._sampling
        bytes_held.append((t.item(), sampling.run.state.memories.bytes_held if sampling else 0))
        scheduler.step(prediction, t, torch.ones(WAN.latent))
    early = [held for timestep, held in bytes_held if timestep > 875]
    within = [held for timestep, held in bytes_held if 150 < timestep < 800]
    late = [held for timestep, held in bytes_held if timestep < 100]
    assert len(early) > 4 and not any(early)
    assert all(within) and not any(late)
    assert handle.report.count("reused") > 3
