"""The caches in real ComfyUI sampling of the demo model."""

import gc
import time
import weakref
from collections import Counter
from dataclasses import is_dataclass

import pytest
import torch
from zoo.replay import Replay

from cache_core.run.run import CacheRun
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.step import Schedule

PROMPT = "a big red ball at the center on a blue striped background"
OFF = [
    FirstBlockCache(residual_diff_threshold=0.0),
    TaylorSeerCache(cache_interval=1),
    PyramidAttentionBroadcast(spatial_attention_block_skip_range=1),
    FasterCache(spatial_attention_block_skip_range=1, unconditional_batch_skip_range=1),
]
NEVER_MET = [  # everything is measured and kept, nothing reused
    FirstBlockCache(residual_diff_threshold=1e-9),
    PyramidAttentionBroadcast(
        spatial_attention_timestep_skip_start=1000, spatial_attention_timestep_skip_end=1001, few_steps="draft"
    ),
    FasterCache(spatial_attention_timestep_skip_end=0, unconditional_batch_timestep_skip_end=0, few_steps="draft"),
]
ON = [
    FirstBlockCache(residual_diff_threshold=0.3),
    FirstBlockCache(residual_diff_threshold=0.3, max_order=0),
    TaylorSeerCache(cache_interval=3),
    TaylorSeerCache(cache_interval=3, cache_level="model"),
    TaylorSeerCache(cache_interval=3, cache_level="block"),
    TaylorSeerCache(cache_interval=3, cache_level="module"),
]
ATTENTION = [PyramidAttentionBroadcast(), FasterCache()]


def named(strategies):
    return [pytest.param(s, id=f"{type(s).__name__}-{s.levels[0]}-{getattr(s, 'max_order', 0)}") for s in strategies]


@pytest.fixture
def block_counts(demo, monkeypatch):
    """How often each block of the demo model's classes really ran, counted in the classes' own forwards."""
    counts = Counter()
    network = demo.model().model.diffusion_model
    names = {
        id(block): f"{name}.{i}"
        for name in ("double_blocks", "single_blocks")
        for i, block in enumerate(getattr(network, name))
    }
    for block_class in {type(network.double_blocks[0]), type(network.single_blocks[0])}:
        own = block_class.forward

        def forward(self, *args, _own=own, **kwargs):
            counts[names.get(id(self))] += 1
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(block_class, "forward", forward)
    return counts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_off_settings_give_the_very_same_latent_as_no_node(demo, cached, cfg, batch, sampler, dtype):
    options = dict(cfg=cfg, sampler=sampler, steps=6)
    model, prompts = demo.model(dtype), [PROMPT] * batch
    plain = demo.sample(model, prompts, **options)
    for strategy in (*OFF, *NEVER_MET):
        assert torch.equal(demo.sample(cached(model, strategy), prompts, **options), plain)


@pytest.mark.parametrize("strategy", named(ON))
def test_the_reported_counts_are_those_of_the_blocks_themselves(demo, cached, reports, block_counts, strategy):
    plain = demo.sample(demo.model(), [PROMPT])
    block_counts.clear()
    latent = demo.sample(cached(demo.model(), strategy), [PROMPT])
    (report,) = reports.all
    assert report.count("reused", "forecast") >= 8
    assert report.count("computed") == block_counts["single_blocks.3"]
    if strategy.levels[0] != "module":  # there double blocks run, around forecasts of their feed-forward modules
        assert report.computed_share == pytest.approx(sum(block_counts.values()) / 6 / len(report.calls))
    assert torch.isfinite(latent).all() and not torch.equal(latent, plain)


def test_the_report_tells_branches_reasons_and_seconds(demo, cached, reports):
    demo.sample(cached(demo.model(), FirstBlockCache(residual_diff_threshold=0.2)), [PROMPT])
    report = reports.all[0].as_dict()
    assert report["blocks"] == "2 double_blocks + 4 single_blocks"
    assert report["totals"]["branches"]["positive"] == report["totals"]["branches"]["negative"]
    assert sum(report["totals"]["branches"]["positive"].values()) == 20 == len(report["calls"])
    assert all(call["reason"] and call["seconds"] > 0 for call in report["calls"])
    reused = [call for call in report["calls"] if call["action"] != "computed"]
    assert reused and all("under 0.2" in call["reason"] and call["computed_share"] == 1 / 6 for call in reused)
    assert report["totals"]["speed_up"] > 1 and report["totals"]["bytes_held"] > 0


@pytest.mark.parametrize("strategy", named(ON))
def test_branches_split_joined_or_changing_decide_and_draw_alike(demo, cached, reports, monkeypatch, strategy):
    base, own = type(demo.model().model), type(demo.model().model).memory_required
    latents, decisions = {}, {}
    for how in ("joined", "split", "changing"):
        asked = Counter()

        def needed(self, shape, *args, _how=how, _asked=asked, **kwargs):
            if shape[0] > 1:
                _asked["evaluations"] += 1
            too_much = _how == "split" or (_how == "changing" and _asked["evaluations"] // 3 % 2)
            return float("inf") if too_much and shape[0] > 1 else own(self, shape, *args, **kwargs)

        monkeypatch.setattr(base, "memory_required", needed)
        latents[how] = demo.sample(cached(demo.model(), strategy), [PROMPT])
        calls = reports.all[-1].calls
        decisions[how] = [{"computed": 0}.get(c.action, 1) for c in calls for b in c.branches if b == "positive"]
        assert {len(call.branches) for call in calls} == {"joined": {2}, "split": {1}, "changing": {1, 2}}[how]
    assert decisions["joined"] == decisions["split"] == decisions["changing"] and sum(decisions["split"]) >= 8
    for how in ("split", "changing"):  # other batch sizes sum in another order
        assert torch.allclose(latents[how], latents["joined"], atol=1e-4)


def tensors_in(value):
    """All tensors that a state holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = (
        list(value) if isinstance(value, (list, tuple)) else list(vars(value).values()) if is_dataclass(value) else []
    )
    return [tensor for item in inside for tensor in tensors_in(item)]


class Stop(Exception):
    pass


def untouched(model):
    return [(name, set(vars(module))) for name, module in model.model.diffusion_model.named_modules()]


@pytest.mark.parametrize("strategy", named([*ON, *ATTENTION]))
@pytest.mark.parametrize("way", ["finished", "cancelled", "failing in a block"])
def test_nothing_stays_behind(demo, comfy, cached, monkeypatch, way, strategy):
    model = demo.model()
    plain, before = demo.sample(model, [PROMPT]), untouched(model)

    def stop_at_seven(step, *_):
        if step == 7:
            raise comfy.model_management.InterruptProcessingException

    def fail(self, *args, **kwargs):
        raise Stop

    if way == "finished":
        demo.sample(cached(model, strategy), [PROMPT])
    elif way == "cancelled":
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            demo.sample(cached(model, strategy), [PROMPT], callback=stop_at_seven)
    else:
        with monkeypatch.context() as patch, pytest.raises(Stop):

            def fail_from_seven(step, *_):
                if step == 7:
                    patch.setattr(type(model.model.diffusion_model.single_blocks[0]), "forward", fail)

            demo.sample(cached(model, strategy), [PROMPT], callback=fail_from_seven)
    assert untouched(model) == before
    assert torch.equal(demo.sample(model, [PROMPT]), plain)


@pytest.mark.parametrize("strategy", named([*ON, *ATTENTION]))
def test_no_stored_tensor_outlives_the_run(demo, cached, monkeypatch, strategy):
    stored, own = [], CacheRun.end_evaluation

    def end_evaluation(self, *predictions):
        stored.extend(map(weakref.ref, tensors_in([memory.state for memory in self.state.memories.values()])))
        return own(self, *predictions)

    monkeypatch.setattr(CacheRun, "end_evaluation", end_evaluation)
    demo.sample(cached(demo.model(), strategy), [PROMPT])
    gc.collect()
    assert len(stored) >= 2 and not [tensor for tensor in stored if tensor() is not None]


def test_a_second_run_of_the_same_model_is_the_same_as_the_first(demo, cached):
    model = cached(demo.model(), FirstBlockCache())
    assert torch.equal(demo.sample(model, [PROMPT]), demo.sample(model, [PROMPT]))


def test_the_plain_model_beside_a_cached_clone_stays_plain(demo, cached):
    plain = demo.sample(demo.model(), [PROMPT])
    cached(demo.model(), TaylorSeerCache())
    assert torch.equal(demo.sample(demo.model(), [PROMPT]), plain)


def test_of_two_strategies_on_one_level_the_later_counts(demo, cached, reports):
    from cache_core.adapters.comfyui import strategies_of

    first, second = TaylorSeerCache(cache_level="model"), FirstBlockCache(residual_diff_threshold=0.3)
    model = cached(cached(demo.model(), first), second)
    assert strategies_of(model) == (second,)
    assert torch.equal(demo.sample(model, [PROMPT]), demo.sample(cached(demo.model(), second), [PROMPT]))


def test_the_latent_that_goes_in_is_not_changed(demo, cached):
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    before = latent.clone()
    demo.sample(cached(demo.model(), TaylorSeerCache()), [PROMPT], latent=latent, denoise=0.5)
    assert torch.equal(latent, before)


@pytest.mark.parametrize("probes", [False, True], ids=["whole stack", "behind the first block"])
@pytest.mark.parametrize("signal", [False, True], ids=["alone", "with a ControlNet's signal"])
def test_replaying_the_same_inputs_gives_the_same_output(demo, comfy, block_counts, signal, probes):
    from cache_core.adapters.comfyui.calls import CONTROLNET, apply_model, predict_noise
    from cache_core.adapters.comfyui.seams import KEY

    model = demo.model()
    comfy.model_management.load_models_gpu([model])
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    run = CacheRun([Replay(probes=probes)], Schedule([1.0, 0.5, 0.0]))
    wrappers = {"apply_model": {KEY: [apply_model]}}
    inputs = dict(c_crossattn=draw(1, 8, 96), y=draw(1, 96), transformer_options={KEY: run, "wrappers": wrappers})
    x, sigma = draw(1, 16, 8, 8), torch.tensor([0.7])
    control = {"input": [draw(1, 16, 256) for _ in range(2)], "output": [draw(1, 16, 256) for _ in range(4)]}

    def evaluate():
        forward = lambda *_: model.model.apply_model(x, sigma, **inputs, control=control if signal else None)  # noqa: E731
        return predict_noise(forward, x, sigma, {"transformer_options": {KEY: run}})

    computed = evaluate()
    block_counts.clear()
    replayed = evaluate()
    assert sum(block_counts.values()) == probes
    assert (CONTROLNET in run.report.notes) == signal
    velocity, replayed_velocity = x - computed, x - replayed
    assert ((replayed_velocity - velocity).norm() / velocity.norm()).item() <= 1e-6


def test_the_seconds_of_a_run_do_not_count_loading(demo, cached, reports, comfy, monkeypatch):
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management, "load_models_gpu", lambda *args, **kwargs: (time.sleep(2), load(*args, **kwargs))[1]
    )
    demo.sample(cached(demo.model(), TaylorSeerCache()), [PROMPT], steps=4)
    (report,) = reports.all
    assert 0 < sum(call.seconds for call in report.calls) <= report.seconds < 2
