"""Each way in which diffusers' schedulers and pipelines count timesteps: a step is what its scheduler says."""

from __future__ import annotations

import pytest
import torch
from models import TEXT_TOKENS, TEXT_WIDTH, WAN, diffusers, flow_match, made, tiny
from test_better import relative_error

from cache_core.adapters.diffusers import apply
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

STEPS = 12
FORECAST = TaylorSeerCache(cache_interval=3, disable_cache_before_step=2, few_steps="draft")


def _set(scheduler, **settings):
    scheduler.set_timesteps(STEPS, **settings)
    return scheduler


def _as_given(scheduler, index):
    return scheduler.timesteps[index]


def _cosmos_2(scheduler, index):
    return scheduler.sigmas[index] / (scheduler.sigmas[index] + 1)


def _sprint(scheduler, index):
    angle = scheduler.timesteps[index]
    return torch.sin(angle) / (torch.cos(angle) + torch.sin(angle))


def _karras_flow():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002)
    return _set(scheduler, sigmas=torch.linspace(0, 1, STEPS).tolist())


def _continuous():
    return _set(
        diffusers.EulerDiscreteScheduler(
            timestep_type="continuous",
            prediction_type="v_prediction",
            sigma_min=0.002,
            sigma_max=700.0,
            use_karras_sigmas=True,
        )
    )


WAYS = {  # the scheduler, and what the model is told at its step
    "EDM": (lambda: _set(diffusers.EDMEulerScheduler()), _as_given),
    "EDM DPM++": (lambda: _set(diffusers.EDMDPMSolverMultistepScheduler()), _as_given),
    "continuous Euler": (_continuous, _as_given),
    "consistency": (lambda: _set(diffusers.CMStochasticIterativeScheduler()), _as_given),
    "TrigFlow": (lambda: _set(diffusers.SCMScheduler(), max_timesteps=1.5708, intermediate_timesteps=None), _as_given),
    "Sana Sprint": (lambda: _set(diffusers.SCMScheduler(), max_timesteps=1.5708, intermediate_timesteps=None), _sprint),
    "Cosmos 2": (_karras_flow, _cosmos_2),
    "Flux": (lambda: _set(flow_match()), lambda scheduler, index: scheduler.timesteps[index] / 1000),
    "Z-Image": (lambda: _set(flow_match()), lambda scheduler, index: 1 - scheduler.timesteps[index] / 1000),
    "Wan": (lambda: _set(WAN.scheduler()), _as_given),
    "inversion": (lambda: _set(diffusers.DDIMInverseScheduler()), _as_given),
    "inversion DPM++": (lambda: _set(diffusers.DPMSolverMultistepInverseScheduler()), _as_given),
    "MiniMax-H3": (lambda: _set(diffusers.MiniMaxH3Scheduler()), _as_given),
    "midpoints": (lambda: _set(diffusers.KDPM2DiscreteScheduler()), _as_given),
}


def sampled(strategy, scheduler, told, dtype=torch.float32, first=0, pass_scheduler=True, reset=True):
    """The report of a loop with a call for each of two prompts and no contexts; `first` is where it begins."""
    model, random = made(WAN), torch.Generator().manual_seed(1)
    handle = apply(model, strategy, scheduler=scheduler if pass_scheduler else None)
    texts = torch.randn(2, 1, TEXT_TOKENS, TEXT_WIDTH, generator=random)
    latent, prompts = torch.randn(WAN.latent, generator=random), [texts[0], texts[1]]
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    for index in range(first, len(scheduler.timesteps)):
        timestep = told(scheduler, index).to(dtype).reshape(1)
        given, without = (model(latent, timestep, text, return_dict=False)[0] for text in prompts)
        latent = 0.9 * latent + 0.1 * (without + 3 * (given - without))
        if getattr(scheduler, "step_index", "none") != "none":  # as its step() counts
            scheduler._step_index = index + 1
    if reset:
        handle.engine.reset()
    return handle.report


@pytest.mark.parametrize("pass_scheduler", [True, False], ids=["scheduler", "no-scheduler"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_what_its_scheduler_says(way, pass_scheduler):
    scheduler, told = WAYS[way][0](), WAYS[way][1]
    report = sampled(FORECAST, scheduler, told, pass_scheduler=pass_scheduler)
    count = len(scheduler.timesteps)
    actions = {}
    for call in report.calls:
        actions.setdefault(call.evaluation, []).append(call.action)
    assert len(actions) >= count - 1  # without a scheduler, what a run counts like shows in its second step
    assert all(len(both) == 2 and len(set(both)) == 1 for both in actions.values())
    assert count <= report.count("reused", "forecast") < 1.5 * count
    if pass_scheduler:
        assert [call.step.index for call in report.calls[::2]] == list(range(count))


@pytest.mark.parametrize("way", ["EDM", "Flux", "inversion"])
@pytest.mark.parametrize("level", ["output", "model"])
def test_a_wished_speed_up_is_exact_with_a_scheduler_and_approached_without(way, level):
    wish = TaylorSeerCache(target_speedup=1.5, cache_level=level)
    (scheduler, told), told_of = (WAYS[way][0](), WAYS[way][1]), "is not known in advance, so target_speedup 1.5"
    count = len(scheduler.timesteps)
    for pass_scheduler in (True, False):
        report = sampled(wish, scheduler, told, pass_scheduler=pass_scheduler)
        computed = {call.step.index for call in report.calls if call.action == "computed"}
        assert any(told_of in note for note in report.notes) != pass_scheduler
        if pass_scheduler:
            assert len(computed) == round(count / 1.5) if level == "output" else len(computed) < count / 1.5 + 1
            assert {0, count - 1} <= computed
            scheduler = WAYS[way][0]()
        assert 0.15 * count < report.count("reused", "forecast") / 2 < 0.5 * count


@pytest.mark.parametrize("way", ["EDM", "Z-Image", "Flux", "TrigFlow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_begins_late_is_read_likewise(way, dtype):
    scheduler, told = WAYS[way][0](), WAYS[way][1]
    report = sampled(FORECAST, scheduler, told, dtype, first=5)
    count = len(scheduler.timesteps) - 5
    assert [call.step.index for call in report.calls[::2]] == list(range(count))
    assert report.count("reused", "forecast") > 0


@pytest.mark.parametrize("way, timesteps", [("EDM", (987.8, 750)), ("Flux", (1000, 900)), ("inversion", (0, 83))])
def test_windows_of_timesteps_mean_the_same_on_every_scale(way, timesteps):
    scheduler, told = WAYS[way][0](), WAYS[way][1]
    report = sampled(FORECAST, scheduler, told)
    first, second = report.calls[0].step, report.calls[2].step
    assert first.timestep == pytest.approx(timesteps[0], abs=2)
    assert (second.timestep < first.timestep) == (timesteps[1] < timesteps[0])


# A real pipeline's loop: Cosmos 1's.

COSMOS = tiny(
    "CosmosTransformer3DModel",
    out_channels=4,
    num_layers=4,
    mlp_ratio=2,
    text_embed_dim=TEXT_WIDTH,
    adaln_lora_dim=4,
    max_size=(4, 32, 32),
    patch_size=(1, 2, 2),
    rope_scale=(2.0, 1.0, 1.0),
    concat_padding_mask=False,
    extra_pos_embed_type="learnable",
)


def cosmos(strategy=None, steps=STEPS, guidance=3.0):
    """The final latent of CosmosTextToWorldPipeline's loop, and the report."""
    torch.manual_seed(0)
    model, scheduler = COSMOS().eval(), diffusers.EDMEulerScheduler(sigma_data=1.0, final_sigmas_type="sigma_min")
    handle = None if strategy is None else apply(model, strategy, scheduler=scheduler)
    random = torch.Generator().manual_seed(1)
    texts = [torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=random) for _ in range(2)]
    scheduler.set_timesteps(steps)
    latent = torch.randn(1, 4, 2, 8, 8, generator=random) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(latent, t)
        inputs = dict(hidden_states=given, timestep=t.expand(1), fps=30, return_dict=False)
        both = torch.cat([model(encoder_hidden_states=text, **inputs)[0] for text in texts])
        clean = scheduler.step(both, t, torch.cat([latent, latent]), return_dict=False)[1]
        scheduler._step_index -= 1
        with_prompt, without = clean.chunk(2)
        clean = with_prompt + guidance * (with_prompt - without)
        latent = scheduler.step(clean, t, latent, return_dict=False, pred_original_sample=clean)[0]
    return latent, handle and handle.report


def test_cosmos_1_is_closer_than_fewer_steps():
    exact, _ = cosmos()
    latent, report = cosmos(TaylorSeerCache(cache_interval=2))
    fewer, _ = cosmos(steps=8)
    assert report.count("computed") <= 2 * 8 and report.count("reused", "forecast") >= 2 * 4
    assert relative_error(latent, exact) < 0.5 * relative_error(fewer, exact)  # 0.023 and 0.093


@pytest.mark.parametrize("strategy", [FirstBlockCache(residual_diff_threshold=0.3), PyramidAttentionBroadcast()])
def test_cosmos_1_reuses_with_every_strategy(strategy):
    _, report = cosmos(strategy)
    assert report.count("reused", "forecast") > 0 and report.state == "finished"


# When a run is over.


def test_a_scheduler_that_is_not_the_pipelines_is_named_as_such(caplog):
    scheduler, told = WAYS["Flux"][0](), lambda _, index: torch.tensor(3000.0 - index)
    sampled(FORECAST, scheduler, told)
    assert "none of those of the scheduler that was passed" in caplog.text
    assert "Pass scheduler= to apply" not in caplog.text
