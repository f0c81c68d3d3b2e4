"""What the report says of guiders that run the prompts in other ways than one positive and one negative together."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from cache_core.run.run import BRANCHES_CHANGE
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPT = "a big red ball at the center on a blue striped background"
OTHER = "a small green square at the center on a white background"
STEPS = 12
FIRST_BLOCK, TAYLORSEER = FirstBlockCache(residual_diff_threshold=0.3), TaylorSeerCache(cache_interval=3)
SKIPS_NEGATIVE = FasterCache(
    spatial_attention_block_skip_range=1, unconditional_batch_skip_range=3, unconditional_batch_timestep_skip_end=1001
)


def extra(module, name):
    """One of ComfyUI's own nodes; skips where this ComfyUI does not have it."""
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name, None)
    return node or pytest.skip(f"this ComfyUI has no {name}")


@pytest.fixture
def guide(comfy, demo):
    """Samples by a guider, as SamplerCustomAdvanced does."""

    def guide(guider, model, steps=STEPS):
        latent = torch.zeros(1, 16, 8, 8)
        sigmas = comfy.samplers.KSampler(model, steps, "cpu", "euler", "simple").sigmas
        sampler, noise = comfy.samplers.sampler_object("euler"), comfy.sample.prepare_noise(latent, 1)
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=1)

    return guide


@pytest.fixture
def conditioning(comfy):
    from cache_core.adapters.comfyui.demo import load_clip

    clip = load_clip()
    return lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.fixture
def watched(cached):
    """A MODEL with a cache, and the reports of all its runs, also of those that never were."""
    from types import SimpleNamespace

    from cache_core.adapters.comfyui import with_cache

    def watched(model, strategy):
        reports = []
        ended = lambda latent: None  # noqa: E731
        watch = lambda report: reports.append(report) or SimpleNamespace(called=lambda: None, ended=ended)  # noqa: E731
        return with_cache(model, strategy, watch=watch), reports

    return watched


@pytest.mark.parametrize("part", [(0.0, 0.6), (0.6, 1.0)], ids=["at first", "at the end"])
def test_where_the_negative_prompt_is_not_run_in_some_steps_it_is_said_of_those(demo, cached, reports, part):
    override = extra("nodes_custom_sampler", "CFGOverride")
    model = cached(demo.model(), SKIPS_NEGATIVE)
    demo.sample(override.execute(model, 1.0, *part).result[0], [PROMPT], steps=STEPS)
    (report,) = reports.all
    assert report.count("reused", "forecast", branch="negative") >= 2
    assert 0 < report.count("computed", branch="negative") < STEPS - 2
    (note,) = report.notes
    assert note.startswith("where cfg is 1, or with a distilled model,")


def skip_layer_guidance(model):
    return extra("nodes_slg", "SkipLayerGuidanceDiT").execute(model, 1.0, 0.0, 1.0, "1", "1, 2").result[0]


def perturbed_attention(model):
    """A third prediction, of the positive prompt alone, after the guidance."""
    from comfy.samplers import calc_cond_batch

    def guide(args):
        (again,) = calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"])
        return args["denoised"] + 0.1 * (args["cond_denoised"] - again)

    guided = model.clone()
    guided.set_model_sampler_post_cfg_function(guide)
    return guided


@pytest.mark.parametrize("guidance", [skip_layer_guidance, perturbed_attention])
def test_of_a_third_prediction_it_is_not_said_that_the_guider_has_one_branch(demo, cached, reports, guidance):
    demo.sample(guidance(cached(demo.model(), SKIPS_NEGATIVE)), [PROMPT], steps=STEPS)
    (report,) = reports.all
    assert report.count("reused", "forecast", branch="negative") >= STEPS / 2
    assert not any("guider" in note for note in report.notes)


def dual(model, negative_model, conditioning):
    node = extra("nodes_custom_sampler", "DualModelGuider")
    return node.execute(model, conditioning(PROMPT), 3.0, negative_model, conditioning("")).result[0]


def test_a_guider_that_asks_for_one_prompt_at_a_time_is_called_so(demo, cached, reports, guide, conditioning):
    model = cached(demo.model(), SKIPS_NEGATIVE)
    guide(dual(model, demo.model(), conditioning), model)
    (note,) = reports.all[0].notes
    assert "asks for one at a time" in note
    both = cached(demo.model(), replace(FIRST_BLOCK, repair="off"))
    guide(dual(both, demo.model(), conditioning), both)
    assert len(reports.all[1].calls) == 2 * STEPS and reports.all[1].count("reused", "forecast") >= 8  # of both models
    assert reports.all[1].notes == []


@pytest.mark.parametrize("strategy", [FIRST_BLOCK, TAYLORSEER, SKIPS_NEGATIVE], ids=lambda each: each.title)
def test_a_cache_on_the_negative_model_alone_says_that_it_does_nothing(
    demo, guide, conditioning, watched, strategy, caplog
):
    plain = guide(dual(demo.model(), demo.model(), conditioning), demo.model())
    model, told = watched(demo.model(), strategy)
    latent = guide(dual(demo.model(), model, conditioning), demo.model())
    assert torch.equal(latent, plain)
    (report,) = told
    assert report.state == "finished" and report.calls == []
    assert "caches on this model did nothing" in report.so_far()["summary"] and report.line() in caplog.messages


def test_a_cache_on_both_models_or_on_the_first_is_not_told_that(demo, guide, conditioning, watched):
    model, told = watched(demo.model(), TAYLORSEER)
    guide(dual(model, model, conditioning), model)
    guide(dual(model, demo.model(), conditioning), model)
    demo.sample(model, [PROMPT], steps=STEPS)
    assert [report.count("forecast") >= 4 and report.notes for report in told] == [[], [], []]
    other, of_other = watched(demo.model(), FIRST_BLOCK)
    guide(dual(model, other, conditioning), model)
    assert told[-1].count("forecast") >= 4 and of_other[0].calls == [] and of_other[0].notes


def test_a_guider_that_alternates_prompts_is_told_why_nothing_is_reused(
    demo, comfy, cached, reports, guide, conditioning
):
    """As FlowEdit does: the source's prediction, then the target's, at every step."""

    class Alternating(comfy.samplers.CFGGuider):
        turn = 0

        def predict_noise(self, *args, **kwargs):
            self.turn += 1
            self.conds["positive"] = self.conds["source" if self.turn % 2 else "target"]
            return super().predict_noise(*args, **kwargs)

    guider = Alternating(model := cached(demo.model(), FIRST_BLOCK))
    guider.inner_set_conds(
        {"source": conditioning(PROMPT), "target": conditioning(OTHER), "negative": conditioning("")}
    )
    guider.set_cfg(1.0)
    guide(guider, model)
    (report,) = reports.all
    assert report.count("reused", "forecast") == 0 and BRANCHES_CHANGE in report.notes
    assert "guiders that alternate prompts" in BRANCHES_CHANGE


@pytest.mark.parametrize("strategy", [FIRST_BLOCK, TAYLORSEER, FasterCache()], ids=lambda each: each.title)
def test_a_run_of_one_step_is_one_step(demo, cached, reports, strategy):
    plain = demo.sample(demo.model(), [PROMPT], steps=1)
    assert torch.equal(demo.sample(cached(demo.model(), strategy), [PROMPT], steps=1), plain)
    said = reports.all[0].as_dict()
    assert "1 model call:" in said["summary"] and "1 steps" not in str(said) and said["warnings"]
