"""Which run and branch a call belongs to in loops of diffusers that announce little, and what a run leaves behind."""

from __future__ import annotations

import time
from dataclasses import replace

import models
import pytest
import torch
from models import FLUX, SD3, STEPS, TEXT_TOKENS, TEXT_WIDTH, WAN, Clock, denoise, diffusers, flow_match, made
from test_better import tensors_held
from torch.overrides import TorchFunctionMode

from cache_core.adapters.diffusers import apply, cache_context
from cache_core.adapters.diffusers.steps import number_in, schedule_for
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


COUNTS_NOT = {  # schedulers that know no step_index
    "CogVideoX DDIM": models.ddim,
    "CogVideoX DPM": diffusers.CogVideoXDPMScheduler,
    "DDIM": diffusers.DDIMScheduler,
    "DDPM": diffusers.DDPMScheduler,
}


@pytest.mark.parametrize("strategy", [FIRST_BLOCK, FORECAST, BROADCAST], ids=lambda strategy: strategy.title)
@pytest.mark.parametrize("name", COUNTS_NOT)
def test_a_call_waits_once_at_most_where_the_timestep_is_an_entry_of_the_schedulers(strategy, name):
    scheduler, model, reads = COUNTS_NOT[name](), made(WAN), []
    assert not hasattr(scheduler, "step_index")
    texts, latent = torch.randn(2, 1, TEXT_TOKENS, TEXT_WIDTH), torch.ones(WAN.latent)
    handle = apply(model, strategy, scheduler=scheduler)
    scheduler.set_timesteps(12)
    for t in scheduler.timesteps[2:]:  # as from a picture
        for text in texts:
            with CountingReads() as counting:
                prediction = model(latent, t.expand(1), text, return_dict=False)[0]
            reads.append(counting.reads)
        latent = latent - 0.05 * prediction
    assert [call.step.index for call in handle.report.calls[::2]] == list(range(10))
    assert handle.report.count("reused", "forecast") > 4
    assert max(reads[2:]) <= 1  # was 2


COPIES = {
    "HunyuanDiT": lambda t: torch.tensor([t] * 1),
    "in half precision": lambda t: t.to(torch.bfloat16).reshape(1),
}


def _counted(model, latent, timestep, text):
    """The prediction, and how often the device would have been waited for."""
    with CountingReads() as counting:
        prediction = model(latent, timestep, text, return_dict=False)[0]
    return prediction, counting.reads


@pytest.mark.parametrize("strategy", [FIRST_BLOCK, FORECAST, BROADCAST], ids=lambda strategy: strategy.title)
@pytest.mark.parametrize("name", COUNTS_NOT)
@pytest.mark.parametrize("copy", COPIES)
def test_a_call_waits_once_at_most_where_the_timestep_is_a_copy(strategy, name, copy):
    scheduler, model, reads = COUNTS_NOT[name](), made(WAN), []
    texts, latent = torch.randn(2, 1, TEXT_TOKENS, TEXT_WIDTH), torch.ones(WAN.latent)
    handle = apply(model, strategy, scheduler=scheduler)
    scheduler.set_timesteps(12)
    for t in scheduler.timesteps:
        timestep = COPIES[copy](t)
        for text in texts:
            prediction, waits = _counted(model, latent, timestep, text)
            reads.append(waits)
        latent = latent - 0.05 * prediction
    assert [call.step.index for call in handle.report.calls[::2]] == list(range(12))
    assert handle.report.count("reused", "forecast") > 4
    assert max(reads[2 * 2 :]) <= 1  # was 2; the first two evaluations show that steps go on in order


@pytest.mark.parametrize("strategy", [FIRST_BLOCK, FORECAST, BROADCAST], ids=lambda strategy: strategy.title)
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 7, 8, 9], [0, 1, 2, 3, 3, 4, 5], [0, 1, 2, 3, 0, 1, 2, 3]], ids=str)
def test_a_copy_of_another_timestep_than_the_next_is_noticed(strategy, order):
    """A scheduler that counts no steps is supposed to go on in order: where it does not, the call is computed."""
    scheduler, model, reports = diffusers.DDPMScheduler(), made(WAN), []
    latent, text = torch.ones(WAN.latent), torch.randn(1, TEXT_TOKENS, TEXT_WIDTH)
    handle = apply(model, strategy, scheduler=scheduler)
    scheduler.set_timesteps(12)
    for place, index in enumerate(order):
        timestep = scheduler.timesteps[index].clone().reshape(1)
        prediction, _ = _counted(model, latent, timestep, text)
        if place == 4:
            with torch.no_grad():
                plain = made(WAN)(latent, timestep, text, return_dict=False)[0]
            assert torch.equal(prediction, plain)
        reports += [] if handle.report in reports else [handle.report]
        latent = latent - 0.05 * prediction
    handle.engine.reset()
    assert len(reports) == 2 and reports[0].state == "finished"
    assert reports[1].calls[0].action == "computed"
    assert [call.step.timestep for call in reports[1].calls] == pytest.approx(scheduler.timesteps[order[4:]].tolist())


COUNTED = {  # how models count their timesteps where no scheduler is passed
    "thousandths": lambda shares: 1000 * shares,
    "shares": lambda shares: shares,
    "counting up": lambda shares: 1 - shares,
    "in half precision": lambda shares: (1000 * shares).bfloat16(),
    "logarithms of sigma": lambda shares: shares.logit(eps=1e-4) / 4,
    "angles": lambda shares: torch.atan(shares / (1 - shares)),
}


def _timesteps(name):
    return COUNTED[name](torch.linspace(1, 0.1, 12)).reshape(12, 1)


@pytest.mark.parametrize("strategy", [FIRST_BLOCK, FORECAST, BROADCAST], ids=lambda strategy: strategy.title)
@pytest.mark.parametrize("name", COUNTED)
def test_a_call_waits_once_at_most_where_no_scheduler_tells(strategy, name):
    model, reads = made(WAN), []
    texts, latent = torch.randn(2, 1, TEXT_TOKENS, TEXT_WIDTH), torch.ones(WAN.latent)
    handle = apply(model, strategy)
    for timestep in _timesteps(name):
        for text in texts:
            prediction, waits = _counted(model, latent, timestep.clone(), text)
            reads.append(waits)
        latent = latent - 0.05 * prediction
    handle.engine.reset()
    assert [call.step.index for call in handle.report.calls[::2]] == list(range(12))
    assert [call.step.time for call in handle.report.calls[::2]] == pytest.approx(
        torch.linspace(1, 0.1, 12).tolist(), rel=0.01
    )
    assert handle.report.count("reused", "forecast") > 4
    assert max(reads[2 * 2 :]) <= 1  # was 2; the first two evaluations show where the steps go


@pytest.mark.parametrize("strategy", [FIRST_BLOCK, FORECAST, BROADCAST], ids=lambda strategy: strategy.title)
@pytest.mark.parametrize("name", COUNTED)
def test_noise_that_rises_without_a_scheduler_begins_a_run_of_its_own(strategy, name):
    """It is supposed that the next evaluation goes on: where it does not, the call is computed."""
    model, reports, timesteps = made(WAN), [], _timesteps(name)
    latent, text = torch.ones(WAN.latent), torch.randn(1, TEXT_TOKENS, TEXT_WIDTH)
    handle = apply(model, strategy)
    for index in (0, 1, 2, 3, 4, 0, 1, 2):
        prediction, _ = _counted(model, latent, timesteps[index].clone(), text)
        reports += [] if handle.report in reports else [handle.report]
        latent = latent - 0.05 * prediction
    handle.engine.reset()
    assert [len(report.calls) for report in reports] == [5, 3]
    assert reports[0].state == "finished" and reports[1].calls[0].action == "computed"
    assert [call.step.index for call in reports[1].calls] == [0, 1, 2]


@pytest.mark.parametrize("strategy", [FIRST_BLOCK, FORECAST], ids=lambda strategy: strategy.title)
def test_prompts_in_turns_are_steps_of_their_own_without_a_scheduler(strategy):
    model, timesteps = made(WAN), _timesteps("thousandths")
    texts, latent = torch.randn(2, 1, TEXT_TOKENS, TEXT_WIDTH), torch.ones(WAN.latent)
    handle = apply(model, strategy)
    for index, timestep in enumerate(timesteps):
        prediction, _ = _counted(model, latent, timestep.clone(), texts[index % 2])
        latent = latent - 0.05 * prediction
    handle.engine.reset()
    assert [call.step.index for call in handle.report.calls] == list(range(12))  # one run


@pytest.mark.parametrize(
    "told",
    [
        lambda scheduler, index: scheduler.timesteps[index].clone(),
        lambda scheduler, index: torch.stack([scheduler.timesteps[index]]),
        lambda scheduler, index: scheduler.timesteps[index].double(),
        lambda scheduler, index: scheduler.timesteps[index : index + 1],
        lambda scheduler, index: scheduler.timesteps[index].expand(3),
    ],
)
def test_a_timestep_is_read_as_it_is_wherever_it_lies(told):
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(12)
    schedule = schedule_for(scheduler, number_in(scheduler.timesteps[0]))
    for index in (0, 3, 11):
        tensor = told(scheduler, index)
        assert schedule.expected(tensor, is_next=False) in (None, number_in(tensor))
    assert schedule.expected(scheduler.timesteps[2:4], is_next=False) is None
    scheduler.timesteps[3] = 7
    assert schedule.expected(scheduler.timesteps[3], is_next=False) is None


# The clock.


def _slow_once():
    """Loads for a while, when it is first called."""
    loads = [0.4]
    return lambda: time.sleep(loads.pop()) if loads else None


def _of_accelerate(model):
    hooks, load = pytest.importorskip("accelerate.hooks"), _slow_once()
    hook = type("Loads", (hooks.ModelHook,), {"pre_forward": lambda _, module, *a, **k: (load(), (a, k))[1]})()
    hooks.add_hook_to_module(model, hook, append=True)


def _of_diffusers(model):
    load = _slow_once()
    hook = type(
        "Loads", (diffusers.hooks.ModelHook,), {"pre_forward": lambda _, module, *a, **k: (load(), (a, k))[1]}
    )()
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, "loads")


@pytest.mark.parametrize("loading", [_of_accelerate, _of_diffusers])
@pytest.mark.parametrize("comes", ["before", "after"])
@pytest.mark.parametrize("denoiser", [WAN, SD3], ids=lambda denoiser: denoiser.name)
def test_seconds_of_sampling_exclude_loading(denoiser, loading, comes):
    model = made(denoiser)
    loading(model) if comes == "before" else None
    handle = apply(model, FORECAST)
    loading(model) if comes == "after" else None
    began = time.perf_counter()
    denoise(denoiser, model, Clock(), steps=6)
    assert handle.report.count("reused", "forecast") > 0
    assert 0 < handle.report.seconds < time.perf_counter() - began - 0.35


@pytest.mark.parametrize("is_offloaded, is_known", [(True, False), (False, True)])
def test_no_seconds_where_loading_can_not_be_told_apart(is_offloaded, is_known):
    """Accelerate's hook on a model that is compiled as a whole: it loads the model within the compiled call."""
    model = made(WAN)
    if is_offloaded:
        _of_accelerate(model)
    model = torch.compile(model, backend="eager")
    handle = apply(model, FORECAST)
    denoise(WAN, model, Clock(), steps=6, context=cache_context)
    assert handle.report.count("reused", "forecast") > 0
    assert (handle.report.seconds > 0) is is_known


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
