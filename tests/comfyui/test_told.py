"""What a cache holds is told to ComfyUI: the next such run's models are loaded so that it has room."""

import pytest
import torch

from cache_core.run.budget import GIB
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast

PROMPT = "a big red ball at the center on a blue striped background"
ALWAYS = dict(spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=1001)
BROADCAST = PyramidAttentionBroadcast(**ALWAYS)
STRATEGIES = [BROADCAST, FirstBlockCache(residual_diff_threshold=0.3)]


@pytest.fixture
def reserved(demo, comfy, monkeypatch):
    """What ComfyUI keeps free beyond its own reserve each time it loads the demo model."""
    management, seen = comfy.model_management, []
    own, before = management.load_models_gpu, management.extra_reserved_memory()

    def load_models_gpu(models, *args, **kwargs):
        if any(model.model is demo.model().model for model in models):
            seen.append(management.extra_reserved_memory() - before)
        return own(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", load_models_gpu)
    yield seen
    assert management.extra_reserved_memory() == before


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.title)
def test_the_next_such_run_is_loaded_with_room_for_what_this_one_held(demo, cached, reports, reserved, strategy):
    model = cached(demo.model(), strategy)
    first = demo.sample(model, [PROMPT], steps=12)
    again = demo.sample(model, [PROMPT], steps=12)
    demo.sample(model, [PROMPT] * 2, steps=12)  # latents of another shape: nothing is known of them
    demo.sample(model, [PROMPT] * 2, steps=12)
    held, _, held_of_two, _ = [report.bytes_foretold for report in reports.all]
    assert reserved == [0, held, 0, held_of_two] and held_of_two == 2 * held > 0
    assert torch.equal(first, again) and reports.all[1].count("reused", "forecast") >= 3


def test_what_is_told_stays_within_the_limit(demo, cached, reports, reserved):
    demo.sample(cached(demo.model(), BROADCAST), [PROMPT], steps=12)
    limit = reports.all[0].bytes_foretold / 2
    model = cached(demo.model(), PyramidAttentionBroadcast(**ALWAYS, memory_limit_gb=limit / GIB))
    for _ in range(2):
        demo.sample(model, [PROMPT], steps=12)
    assert reserved[:2] == [0, 0] and 0.45 * limit <= reserved[2] <= limit


def test_nothing_is_told_by_a_cache_that_is_off_or_by_another_model(demo, cached, reports, reserved):
    off = cached(demo.model(), FirstBlockCache(residual_diff_threshold=0.0))
    for model in (off, off, cached(demo.model(), BROADCAST), demo.model(), cached(demo.model(), BROADCAST)):
        demo.sample(model, [PROMPT], steps=4)
    assert reserved == [0] * 5


def test_a_load_that_fails_leaves_comfyui_s_reserve_as_it_was(demo, comfy, cached, reserved, monkeypatch):
    model = cached(demo.model(), BROADCAST)
    demo.sample(model, [PROMPT], steps=12)

    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises(torch.cuda.OutOfMemoryError):
        patch.setattr(comfy.model_management, "load_models_gpu", fail)
        demo.sample(model, [PROMPT], steps=12)
    demo.sample(model, [PROMPT], steps=12)
    assert len(reserved) == 2 and reserved[1] > 0
