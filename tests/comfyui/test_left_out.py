"""FasterCache in ComfyUI keeps no attention of a negative prompt that is left out; reuse is as if it did."""

from dataclasses import replace

import pytest
import torch
from test_foreign_caches import PUBLISHED, OneForBoth, beside, left_out
from test_other_nodes import normalized_attention_guidance

from cache_core.strategies import faster_cache
from cache_core.strategies.faster_cache import FasterCache

PROMPT = "a big red ball at the center on a blue striped background"
VIDEO_PROMPT = "a red star at the top moving slowly to the left on a blue striped background"
ALWAYS = dict(unconditional_batch_timestep_skip_end=1001, spatial_attention_timestep_skip_end=1001)
FROM_THE_START, AT_DEFAULTS = replace(PUBLISHED, **ALWAYS), FasterCache()


def both(monkeypatch, reports, sample):
    """What `sample` gives and its report; as it is, and as if nobody knew when the negative prompt runs."""
    found = [(sample(), reports.all.pop())]
    monkeypatch.setattr(faster_cache, "last_beside", lambda *_: None)
    return [*found, (sample(), reports.all.pop())]


def decisions(report):
    return [(call.step.index, call.branches, call.action, call.computed_share) for call in report.calls]


@pytest.mark.parametrize(
    ("strategy", "steps", "share"),
    [
        (FROM_THE_START, 20, 0.5),
        (AT_DEFAULTS, 20, 0.5),
        (PUBLISHED, 10, 0.5),
        (PUBLISHED, 20, 1),  # of 20, one is at 650
    ],
    ids=["in all timesteps", "at defaults", "no step between the windows", "one step between them"],
)
@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, "a small green cube on a white background"]], ids=len)
def test_the_picture_is_the_same_of_what_is_held(demo, cached, reports, monkeypatch, strategy, steps, share, prompts):
    (latent, report), (expected, keeping) = both(
        monkeypatch, reports, lambda: demo.sample(cached(demo.model(), strategy), prompts, steps=steps)
    )
    assert torch.equal(latent, expected)
    assert decisions(report) == decisions(keeping) and left_out(report)
    assert any(call.attention_only for call in report.calls)
    assert report.bytes_held == report.bytes_foretold == pytest.approx(share * keeping.bytes_held, rel=0.02)


@pytest.mark.parametrize(
    ("patched", "cfg"),
    [(lambda model: model, 1.0), (normalized_attention_guidance, 3.0)],
    ids=["cfg 1", "NAG, which mixes the prompts"],
)
def test_prompts_that_always_run_reuse_their_attention(demo, cached, reports, monkeypatch, patched, cfg):
    (latent, report), (expected, keeping) = both(
        monkeypatch,
        reports,
        lambda: demo.sample(cached(patched(demo.model()), FROM_THE_START), [PROMPT], steps=20, cfg=cfg),
    )
    assert torch.equal(latent, expected)
    assert decisions(report) == decisions(keeping) and not left_out(report)
    assert report.count("reused", "forecast") == 10
    assert report.bytes_held == keeping.bytes_held


@pytest.mark.parametrize("order", ["cache last", "cache first"])
def test_beside_another_cache_attention_is_reused_as_before(demo, cached, reports, monkeypatch, order):
    (latent, report), (expected, keeping) = both(
        monkeypatch, reports, lambda: beside(OneForBoth(), demo, cached, "fails by size", order)
    )
    assert torch.equal(latent, expected)
    assert decisions(report) == decisions(keeping) and left_out(report) == [8, 9, 10, 11]


def test_the_steps_of_a_video_that_leave_the_negative_prompt_out_reuse_attention(comfy, cached, reports):
    """The call before joins both prompts; Wan's attention is also given positions, which are for both."""
    from cache_core.adapters.comfyui.demo import load_clip, load_video_model

    clip, start = load_clip(), torch.zeros(1, 16, 3, 4, 4)
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (VIDEO_PROMPT, "")]
    noise = comfy.sample.prepare_noise(start, 1)
    every_other = FasterCache(spatial_attention_block_skip_range=2, unconditional_batch_skip_range=2, **ALWAYS)
    model = cached(load_video_model(), every_other)
    comfy.sample.sample(model, noise, 10, 3.0, "euler", "simple", *prompts, start, seed=1, disable_pbar=True)

    (report,) = reports.all
    computed = [call.step.index for call in report.calls if call.action == "computed"]
    reusing = [(call.step.index, call.branches) for call in report.calls if call.attention_only]
    assert computed == [0, 2, 4, 6, 8] and left_out(report) == [1, 3, 5, 7, 9]
    assert reusing == [(step, ("positive",)) for step in left_out(report)]
