"""Strategies on diffusers' models, in loops that announce nothing: which run a call belongs to, and which branch."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch
from models import (
    COGVIDEOX,
    FLUX,
    STEPS,
    TEXT_TOKENS,
    TEXT_WIDTH,
    WAN,
    WAN_JOINED,
    Clock,
    called,
    denoise,
    diffusers,
    flow_match,
    made,
    without_context,
)
from recording import executions
from test_better import Curve, tensors_held

from cache_core.adapters.diffusers import apply, cache_context
from cache_core.adapters.diffusers.arguments import Arguments
from cache_core.adapters.diffusers.configs import settings_of
from cache_core.adapters.diffusers.guidance import half_of
from cache_core.adapters.diffusers.scales import TimestepAxis
from cache_core.adapters.diffusers.steps import schedule_for
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

BROADCAST = PyramidAttentionBroadcast(spatial_attention_timestep_skip_end=1001)
FORECAST = TaylorSeerCache(cache_interval=3)
GUESS = FasterCache(
    unconditional_batch_skip_range=5, unconditional_batch_timestep_skip_end=900, spatial_attention_block_skip_range=1
)
ALL = [BROADCAST, FORECAST, FirstBlockCache(residual_diff_threshold=0.3), FasterCache(), GUESS]


def latent_of(denoiser, given, scheduler=None, runs=1, **options):
    """The latent of the last of some runs, and the handle."""
    model = made(denoiser)
    handle = apply(model, given, scheduler=scheduler)
    for _ in range(runs):
        latent = denoise(denoiser, model, Clock(), **options)
    return latent, handle


# Where a run begins.


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("denoiser", [FLUX, COGVIDEOX, WAN])
def test_a_run_does_not_remember_the_one_before(denoiser, strategy):
    first, handle = latent_of(denoiser, strategy)
    second, _ = latent_of(denoiser, strategy, runs=2)
    assert torch.equal(first, second)
    assert handle.report.count("reused", "forecast") > 0 or (denoiser is FLUX and strategy is GUESS)


def test_the_end_of_a_pipeline_frees_everything():
    _, handle = latent_of(FLUX, BROADCAST)
    assert tensors_held(handle.engine._sampling.run)
    handle.model._reset_stateful_cache()
    assert not tensors_held(handle.engine)
    assert len(handle.report.calls) == STEPS


def test_removal_frees_everything():
    _, handle = latent_of(WAN, BROADCAST)
    engine = handle.engine
    handle.remove()
    assert not tensors_held(engine)


def test_an_error_in_the_model_frees_everything_at_once():
    model = made(FLUX)
    handle = apply(model, BROADCAST)
    denoise(FLUX, model, Clock(), stop_after=3)
    with pytest.raises(RuntimeError):
        called(model, replace(FLUX, latent=(1, 36, 5)))
    assert handle.engine._sampling is None


@pytest.mark.parametrize("same_prompt", [True, False])
def test_the_first_step_again_for_another_prompt_is_another_run(same_prompt):
    model, text = made(FLUX), torch.ones(1, TEXT_TOKENS, TEXT_WIDTH)
    handle = apply(model, BROADCAST)
    for prompt in (text, text if same_prompt else text.clone()):
        with model.cache_context("cond"):
            called(model, FLUX, 900.0, prompt)
    assert len(handle.report.calls) == (2 if same_prompt else 1)


def test_a_scheduler_set_up_anew_is_another_run():
    model, scheduler = made(FLUX), flow_match()
    handle, text = apply(model, BROADCAST, scheduler=scheduler), torch.ones(1, TEXT_TOKENS, TEXT_WIDTH)
    for _ in range(2):
        scheduler.set_timesteps(10)
        called(model, FLUX, scheduler.timesteps[0], text)
    assert len(handle.report.calls) == 1


# Which branch a call is.


@pytest.mark.parametrize("strategy", [BROADCAST, FORECAST, FirstBlockCache(residual_diff_threshold=0.3)])
def test_without_contexts_branches_are_told_apart_by_their_prompts(strategy):
    named, _ = latent_of(WAN, strategy)
    model = made(WAN)
    handle = apply(model, strategy)
    prompts = {}

    def inputs(latent, text, timestep):
        text = prompts.setdefault(text.sum().item(), text)  # as pipelines do: the same tensor in every step
        return WAN.inputs(latent, text, timestep)

    nameless = denoise(replace(WAN, inputs=inputs), model, Clock(), context=without_context)
    assert torch.equal(named, nameless)
    assert handle.report.count("reused", "forecast") > 0


def test_a_prompt_that_is_gone_takes_its_memories_along():
    model = made(WAN)
    handle = apply(model, BROADCAST)
    for _ in range(3):
        called(model, WAN)
        gc.collect()
    branches = {key[0][0] for key in handle.engine._sampling.run.state.memories}
    assert len(branches) == 1


# The schedule.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_scheduler_every_call_is_at_its_step(dtype):
    model, scheduler = made(FLUX, dtype), flow_match()
    handle = apply(model, FORECAST, scheduler=scheduler)
    denoise(replace(FLUX, scheduler=lambda: scheduler), model, Clock(), steps=30)
    handle.model._reset_stateful_cache()
    report = handle.report
    assert [call.step.index for call in report.calls] == list(range(30))
    assert report.steps == 30


def test_a_run_that_begins_late_has_the_rest_of_the_steps():
    scheduler = flow_match()
    scheduler.set_timesteps(20)
    steps = schedule_for(scheduler, scheduler.timesteps[12].item())
    assert steps.count == 8
    assert steps.step_at(steps.begin_evaluation(scheduler.timesteps[13].item())).index == 1


@pytest.mark.parametrize("first, then, sigma", [(1000, 40, 0.04), (1.0, 0.04, 0.04), (0.0, 0.96, 0.04), (0, 960, 0.04)])
def test_timesteps_are_read_as_the_model_counts_them(first, then, sigma):
    assert TimestepAxis(first).sigma_of(then) == pytest.approx(sigma)


def test_the_context_may_tell_the_timestep():
    model = made(FLUX)
    handle = apply(model, BROADCAST)
    for timestep in (900.0, 800.0):
        with cache_context(model, "cond", timestep=timestep):
            called(model, FLUX)
    model._reset_stateful_cache()
    assert [call.step.sigma for call in handle.report.calls] == pytest.approx([0.9, 0.8])


def test_a_model_without_a_timestep_is_computed():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    apply(model, FORECAST)
    assert torch.equal(model(torch.ones(1, 2)), model(torch.ones(1, 2)))


# FasterCache's prediction without the prompt.


def rows_run(denoiser, given):
    """The latent, and how many pictures went through the model."""
    model, rows = made(denoiser), []
    apply(model, given)
    block = (model.transformer_blocks if denoiser is COGVIDEOX else model.blocks)[0]

    def count(module, args, kwargs):
        rows.append(len((args or [*kwargs.values()])[0]))

    block.register_forward_pre_hook(count, with_kwargs=True)
    return denoise(denoiser, model, Clock()), sum(rows)


@pytest.mark.parametrize("denoiser", [COGVIDEOX, WAN_JOINED, WAN])
def test_the_prediction_without_the_prompt_is_estimated(denoiser):
    exact = denoise(denoiser, made(denoiser), Clock())
    latent, rows = rows_run(denoiser, GUESS)
    assert rows < 1.75 * STEPS
    assert 0 < (latent - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("strategy", [BROADCAST, FORECAST, FirstBlockCache(residual_diff_threshold=0.3)])
def test_joined_and_apart_branches_decide_alike(strategy):
    latents, actions = [], []
    for denoiser in (WAN, WAN_JOINED):
        latent, handle = latent_of(denoiser, strategy)
        latents.append(latent)
        calls = handle.report.calls
        actions.append({(call.evaluation, branch, call.action) for call in calls for branch in call.branches})
    apart, joined = actions
    assert joined == apart and len({action for *_, action in joined}) > 1
    assert torch.allclose(*latents, atol=1e-4)


def test_joined_and_apart_it_is_estimated_alike():
    apart, _ = rows_run(WAN, GUESS)
    joined, _ = rows_run(WAN_JOINED, GUESS)
    assert torch.allclose(apart, joined, atol=1e-4)


@pytest.mark.parametrize("kind", ["fails", "answers with a wrong batch"])
def test_both_branches_run_once_another_cache_mistakes_one_for_both(kind):
    """It keeps what both gave in the first step, and answers the third call of the model."""
    model, rows, kept = made(WAN_JOINED), [], []
    own = model.forward

    def forward(hidden_states, *args, **kwargs):
        rows.append(len(hidden_states))
        if len(rows) != 3:
            kept[:] = [own(hidden_states, *args, **kwargs)] if len(rows) == 1 else kept
            return own(hidden_states, *args, **kwargs)
        if kind == "fails":
            raise IndexError("row 1")
        return kept[0]

    model.forward = forward
    handle = apply(model, replace(GUESS, unconditional_batch_timestep_skip_end=1001))
    latent = denoise(WAN_JOINED, model, Clock())
    assert rows == [2, 1, 1, 2, *[2] * (STEPS - 3)]
    assert handle.report.count("reused") == 1
    assert any(note.startswith("the negative prompt runs in every step from here on") for note in handle.report.notes)
    exact = denoise(WAN_JOINED, made(WAN_JOINED), Clock())
    assert (latent - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("denoiser", [WAN, FLUX])
def test_a_batch_of_one_is_no_error_w15(denoiser):
    config = diffusers.FasterCacheConfig(tensor_format="BCFHW", current_timestep_callback=lambda: None)
    latent, _ = latent_of(denoiser, config)
    assert latent.isfinite().all()


def test_what_holds_both_branches_is_halved():
    batch, alone, samples = torch.arange(4.0)[:, None], torch.ones(1), [torch.ones(4, 2), torch.ones(4, 3)]
    kwargs = dict(timestep=alone, mask=torch.ones(8, 3), shapes=[1, 2, 3, 4], samples=samples, rotary=torch.ones(6, 2))
    half = half_of(Arguments((batch,), kwargs, dict(hidden_states=batch) | kwargs), ("timestep", "mask"), half=1)
    assert half.args[0].flatten().tolist() == [2.0, 3.0]
    assert half.kwargs["timestep"] is alone
    assert half.kwargs["mask"].shape == (4, 3)
    assert half.kwargs["shapes"] == [3, 4]
    assert [sample.shape for sample in half.kwargs["samples"]] == [(2, 2), (2, 3)]
    assert half.kwargs["rotary"].shape == (6, 2)


def test_packed_predictions_whose_tokens_are_in_no_known_order_are_not_estimated():
    def shuffled(*given):
        inputs = FLUX.inputs(*given)
        return inputs | dict(img_ids=inputs["img_ids"].flip(0))

    _, handle = latent_of(replace(FLUX, branches="joined", inputs=shuffled), GUESS)
    assert any("3 dimensions" in note for note in handle.report.notes)
    assert handle.report.count("reused", "forecast") == 0


# diffusers' configs.


def strategy_of(config, denoiser=FLUX):
    (strategy,) = settings_of(made(denoiser), config).strategies
    return strategy


def test_first_block_cache_takes_the_threshold():
    assert strategy_of(diffusers.FirstBlockCacheConfig(threshold=0.2)).residual_diff_threshold == 0.2
    assert strategy_of(diffusers.FirstBlockCacheConfig(threshold=-1.0)).is_off
    assert strategy_of(diffusers.FirstBlockCacheConfig(threshold=math.inf)).residual_diff_threshold == 1.0


def test_taylorseer_takes_every_field():
    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=6,
        disable_cache_before_step=2,
        disable_cache_after_step=9,
        max_order=2,
        taylor_factors_dtype=torch.float16,
        cache_identifiers=[r".*\.attn"],
        skip_predict_identifiers=[r".*\.norm1"],
    )
    strategy = strategy_of(config)
    assert (strategy.cache_interval, strategy.disable_cache_before_step, strategy.disable_cache_after_step) == (6, 2, 9)
    assert (strategy.max_order, strategy.taylor_factors_dtype, strategy.levels) == (2, torch.float16, ("module",))
    assert strategy.cache_identifiers == (r".*\.attn", r".*\.norm1")
    assert strategy_of(replace(config, use_lite_mode=True)).levels == ("model",)
    assert strategy_of(replace(config, skip_predict_identifiers=[r".*_blocks\.\d+"])).levels == ("model",)
    assert strategy_of(replace(config, disable_cache_after_step=1)).is_off


@pytest.mark.parametrize(
    ("strategy", "remedy"),
    [
        (TaylorSeerCache(disable_cache_before_step=10, disable_cache_after_step=5), "Raise the latter"),
        (FirstBlockCache(start_percent=0.6, end_percent=0.5), "lower the one or raise the other"),
        (FasterCache(high_frequency_weight_update_start=301), "set start to the lower one"),
        (PyramidAttentionBroadcast(spatial_attention_timestep_skip_end=99), "set start to the lower one"),
    ],
    ids=["TaylorSeer", "First Block Cache", "FasterCache", "Pyramid Attention Broadcast"],
)
def test_settings_that_contradict_each_other_are_an_error_and_attach_nothing(strategy, remedy):
    model = made(FLUX)
    with pytest.raises(ValueError, match=remedy):
        apply(model, strategy)
    apply(model, FirstBlockCache()).remove()


@pytest.mark.parametrize("denoiser", [FLUX, COGVIDEOX, WAN])
def test_taylorseer_by_default_caches_something_on_every_model_w4(denoiser):
    _, handle = latent_of(denoiser, diffusers.TaylorSeerCacheConfig())
    assert handle.report.count("forecast", "reused") > STEPS / 2


def test_taylorseer_forecasts_the_modules_that_are_named_whole_blocks_too():
    names = ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.2.attn"]
    model = made(FLUX)
    with executions(model) as ran:
        apply(model, diffusers.TaylorSeerCacheConfig(cache_identifiers=names[1:]))
        denoise(FLUX, model, Clock())
    every, block, module = map(ran.count, names)
    assert every == STEPS
    assert block == module < STEPS / 2


def test_a_name_that_fits_nothing_is_an_error():
    config = diffusers.TaylorSeerCacheConfig(cache_identifiers=[r"blokcs\.\d+"])
    with pytest.raises(ValueError, match="fits no module of FluxTransformer2DModel"):
        apply(made(FLUX), config)


def test_pyramid_attention_broadcast_takes_every_field():
    config = diffusers.PyramidAttentionBroadcastConfig(
        temporal_attention_block_skip_range=4,
        cross_attention_block_skip_range=6,
        cross_attention_timestep_skip_range=(-100, 5000),
        spatial_attention_timestep_skip_range=(200, 100),
        current_timestep_callback=lambda: 1,
    )
    settings = settings_of(made(WAN), config)
    (strategy,) = settings.strategies
    assert settings.timestep() == 1
    assert (strategy.spatial_attention_block_skip_range, strategy.temporal_attention_block_skip_range) == (1, 4)
    assert (strategy.cross_attention_timestep_skip_start, strategy.cross_attention_timestep_skip_end) == (-1, 1001)
    assert strategy_of(diffusers.PyramidAttentionBroadcastConfig()).spatial_attention_block_skip_range == 2


def test_attention_modules_can_be_chosen_by_name():
    clock, model = Clock(), made(FLUX)
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("^single_transformer_blocks.1",),
        current_timestep_callback=clock,
    )
    with executions(model) as ran:
        apply(model, config)
        denoise(FLUX, model, clock)
    assert ran.count("single_transformer_blocks.1.attn") < STEPS
    assert ran.count("single_transformer_blocks.0.attn") == ran.count("transformer_blocks.1.attn") == STEPS


def test_faster_cache_takes_every_field():
    asked = []

    def weight(value):
        return lambda module: asked.append((value, type(module).__name__)) or value

    clock = Clock()
    config = diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 950),
        temporal_attention_block_skip_range=3,
        temporal_attention_timestep_skip_range=(5, 6),
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 950),
        attention_weight_callback=weight(0.3),
        low_frequency_weight_callback=weight(1.2),
        high_frequency_weight_callback=weight(1.3),
        tensor_format="BFCHW",
        current_timestep_callback=clock,
    )
    model = made(COGVIDEOX)
    handle = apply(model, config)
    (strategy,) = handle.engine.settings.strategies
    denoise(COGVIDEOX, model, clock)
    assert {(0.3, "Attention"), (1.2, type(model).__name__), (1.3, type(model).__name__)} == set(asked)
    assert (strategy.temporal_attention_block_skip_range, strategy.temporal_attention_timestep_skip_end) == (3, 6)
    assert strategy.unconditional_batch_skip_range == 3
    assert strategy_of(replace(config, is_guidance_distilled=True), COGVIDEOX).unconditional_batch_skip_range == 1
    with pytest.raises(ValueError, match="tensor_format"):
        strategy_of(replace(config, tensor_format="BHWC"), COGVIDEOX)


def test_a_report_says_what_was_done():
    _, handle = latent_of(FLUX, FORECAST)
    handle.model._reset_stateful_cache()
    report = handle.report.as_dict()
    assert report["totals"]["calls"] == report["steps"] == STEPS
    assert report["totals"]["branches"].keys() == {"cond"}


def test_calls_that_want_gradients_are_computed():
    model = Curve(lambda timestep: timestep)
    handle = apply(model, FORECAST)
    with torch.enable_grad():
        model(torch.zeros(1, 2, requires_grad=True), 500)
    assert handle.report is None
