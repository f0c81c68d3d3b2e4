"""Runs of few steps: what goes by the schedule computes all of them, says why, and skips where it is asked to."""

import pytest
import torch
from conftest import closeness

from cache_core.demo.workflows import node_id, set_inputs, workflow
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPT = "a big red ball at the center on a blue striped background"
BY_SCHEDULE = (TaylorSeerCache, PyramidAttentionBroadcast, FasterCache)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 6, 8])
@pytest.mark.parametrize("kind", BY_SCHEDULE, ids=lambda kind: kind.title)
def test_few_steps_are_all_computed_bit_for_bit_and_the_report_says_why(demo, cached, reports, kind, steps, cfg):
    plain = demo.sample(demo.model(), [PROMPT], steps=steps, cfg=cfg)
    assert torch.equal(demo.sample(cached(demo.model(), kind()), [PROMPT], steps=steps, cfg=cfg), plain)
    (report,) = reports.all
    assert report.count("computed") == len(report.calls) > 0
    (warning,) = report.as_dict()["warnings"]
    assert f"with only {steps} steps each one changes so much" in warning and kind.title in warning


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 6, 8])
def test_every_picture_of_first_block_cache_is_close_at_few_steps_or_it_says_that_they_are_few(
    demo, cached, reports, scenes, steps, cfg
):
    for seed, prompt in enumerate(scenes(4)):
        run = {"prompts": [prompt], "seed": seed, "steps": steps, "cfg": cfg}
        latent = demo.sample(cached(demo.model(), FirstBlockCache()), **run)
        assert closeness(latent, demo.sample(demo.model(), **run)) >= 50
        report = reports.all[-1]
        assert report.count("reused", "forecast") or f"with only {steps} steps" in report.as_dict()["warnings"][0]


def test_a_higher_threshold_lets_first_block_cache_skip_at_few_steps_too(demo, cached, reports):
    for strategy in (FirstBlockCache(), FirstBlockCache(residual_diff_threshold=0.3)):
        demo.sample(cached(demo.model(), strategy), [PROMPT], steps=8, cfg=1.0)
    usual, higher = reports.all
    assert usual.count("computed") == 8 and higher.count("forecast") > 0
    assert [call.measure for call in usual.calls[1:3]] == [call.measure for call in higher.calls[1:3]]


@pytest.mark.parametrize(
    ("kind", "steps"), [(TaylorSeerCache, 6), (PyramidAttentionBroadcast, 8), (FasterCache, 8)], ids=str
)
def test_draft_and_one_step_more_do_skip(demo, cached, reports, kind, steps):
    demo.sample(cached(demo.model(), kind(few_steps="draft")), [PROMPT], steps=steps, cfg=3.0)
    demo.sample(cached(demo.model(), kind()), [PROMPT], steps=9, cfg=3.0)
    assert len(reports.all) == 2 and all(report.count("reused", "forecast") for report in reports.all)


@pytest.mark.parametrize("version", ["server", "oldest"])
@pytest.mark.parametrize("kind", BY_SCHEDULE, ids=lambda kind: kind.title)
def test_a_prompt_saved_before_there_was_the_setting_still_runs(request, version, kind):
    server = request.getfixturevalue(version)
    name = f"Refrain{kind.__name__}"
    about = server.get("/object_info")[name]["input"]
    assert "few_steps" in about["optional"] and "few_steps" not in about["required"]
    files = {"TaylorSeerCache": "taylorseer", "FasterCache": "faster_cache"}
    prompt = set_inputs(workflow(files.get(kind.__name__, "pyramid_attention_broadcast")), "KSampler", seed=77)
    assert "few_steps" not in prompt[node_id(prompt, name)]["inputs"]
    prompt_id = server.queue(prompt)
    server.follow(prompt_id)
    (run,) = server.get(f"/refrain/runs?prompt_id={prompt_id}")["runs"]
    assert run["report"]["totals"]["reused"] + run["report"]["totals"]["forecast"] > 0
    assert run["report"]["strategies"][0]["settings"]["few_steps"] == "compute all"
