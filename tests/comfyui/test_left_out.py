"""FasterCache in ComfyUI keeps no attention of a negative prompt that is left out; reuse is as if it did."""

import pytest
import torch
from test_foreign_caches import OneForBoth, beside, left_out
from test_other_nodes import normalized_attention_guidance

from cache_core.strategies import faster_cache
from cache_core.strategies.faster_cache import FasterCache

PROMPT = "a big red ball at the center on a blue striped background"
ALWAYS = dict(unconditional_batch_timestep_skip_end=1001, spatial_attention_timestep_skip_end=1001)
FROM_THE_START, AT_DEFAULTS = FasterCache(**ALWAYS), FasterCache()


def both(monkeypatch, reports, sample):
    """What `sample` gives and its report; as it is, and as if nobody knew when the negative prompt runs."""
    found = [(sample(), reports.all.pop())]
    monkeypatch.setattr(faster_cache, "last_beside", lambda *_: None)
    return [*found, (sample(), reports.all.pop())]


def decisions(report):
    return [(call.step.index, call.branches, call.action, call.computed_share) for call in report.calls]


@pytest.mark.parametrize(
    ("strategy", "steps", "share"),
    [(FROM_THE_START, 20, 0.5), (AT_DEFAULTS, 10, 0.5), (AT_DEFAULTS, 20, 1)],  # of 20, one is at 650
    ids=["in all timesteps", "no step between the windows", "one step between them"],
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
