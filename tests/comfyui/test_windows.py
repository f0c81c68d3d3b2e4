"""ComfyUI's context windows: a picture taller than the demo model was trained for, drawn window by window."""

import inspect

import pytest
import torch

from cache_core.demo import words
from cache_core.run.run import BRANCHES_CHANGE
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

ROWS, WINDOW, OVERLAP, STEPS = 16, 8, 2, 20  # rows of the latent, which the windows lie along
STATIC, UNIFORM, LOOPED, BATCHED = "standard_static", "standard_uniform", "looped_uniform", "batched"
SCENE = "a big red ball at the center on a blue striped background"
PLANNED = [TaylorSeerCache(cache_interval=3), TaylorSeerCache(cache_interval=3, cache_level="model")]
ON = [FirstBlockCache(residual_diff_threshold=0.2), *PLANNED, PyramidAttentionBroadcast(), FasterCache()]
NEVER_MET = [
    FirstBlockCache(residual_diff_threshold=1e-9),
    FasterCache(spatial_attention_timestep_skip_end=0, unconditional_batch_timestep_skip_end=0),
]


@pytest.fixture
def windowed(comfy):
    """A clone of the model that samples in windows, by core's node."""
    windows = pytest.importorskip("comfy_extras.nodes_context_windows")

    def through(model, schedule):
        settings = dict(
            context_length=WINDOW, context_overlap=OVERLAP, context_schedule=schedule, context_stride=1,
            closed_loop=False, fuse_method="pyramid", dim=2, freenoise=False, causal_window_fix=False,
        )  # fmt: skip
        known = inspect.signature(windows.ContextWindowsManualNode.execute).parameters
        given = {name: value for name, value in settings.items() if name in known}
        return windows.ContextWindowsManualNode.execute(model, **given).args[0]

    return through


@pytest.fixture
def sample(comfy):
    def sample(model, steps=STEPS, seed=1):
        latent = torch.zeros(1, 16, ROWS, 8)
        tokens, pooled = words.encode(SCENE)
        positive = [[tokens[None], {"pooled_output": pooled[None]}]]
        negative = [[0 * tokens[None], {"pooled_output": 0 * pooled[None]}]]
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(
            model, noise, steps, 3.0, "euler", "simple", positive, negative, latent, seed=seed, disable_pbar=True
        )

    return sample


def relative(some, other):
    return ((some - other).norm() / other.norm()).item()


@pytest.mark.parametrize("schedule", [STATIC, UNIFORM, LOOPED, BATCHED])
def test_caches_that_never_reuse_give_the_very_same_latent(demo, cached, sample, windowed, schedule):
    plain = sample(windowed(demo.model(), schedule), steps=8)
    for strategy in NEVER_MET:
        assert torch.equal(sample(windowed(cached(demo.model(), strategy), schedule), steps=8), plain)
        assert torch.equal(sample(cached(windowed(demo.model(), schedule), strategy), steps=8), plain)


@pytest.mark.parametrize("schedule", [STATIC, UNIFORM, LOOPED, BATCHED])
def test_every_window_is_given_back_its_own(demo, cached, reports, sample, windowed, witnessed, schedule):
    model, seen = witnessed(demo.model())
    latent = sample(windowed(cached(model, TaylorSeerCache(cache_interval=3, max_order=0)), schedule))
    assert seen.wrong == [] and torch.isfinite(latent).all()
    moves = schedule in (UNIFORM, LOOPED)
    assert (BRANCHES_CHANGE in reports.all[0].notes) == moves
    assert seen.replayed >= 2 * 2 * STEPS / 2 or moves


@pytest.mark.parametrize("strategy", ON, ids=lambda s: f"{s.title} {s.levels[0]}")
def test_windows_that_stay_are_drawn_closer_than_in_as_many_fewer_steps(
    demo, comfy, cached, reports, sample, windowed, strategy
):
    """The twin is the same model in the same windows in as many steps as are computed: what that work buys otherwise.
    A twin without windows draws another picture, and says nothing of whether windows' states are right.
    """
    plain = sample(windowed(demo.model(), STATIC))
    error = relative(sample(windowed(cached(demo.model(), strategy), STATIC)), plain)
    (report,) = reports.all
    assert report.count("reused", "forecast") > 0 and report.computed_share < 0.9
    assert BRANCHES_CHANGE not in report.notes
    cost = report.count("computed") / len(report.calls) if "model" in strategy.levels else report.computed_share
    fewer = relative(sample(windowed(demo.model(), STATIC), steps=round(cost * STEPS)), plain)
    if strategy.levels[0] in ("attention",):  # attention is next to none of this model's work
        assert 0 < error < 0.3
    else:
        assert 0 < error < 0.8 * fewer


def test_moving_windows_hold_no_more_than_those_of_one_evaluation(demo, cached, reports, sample, windowed):
    strategy = TaylorSeerCache(cache_interval=3, max_order=1)
    sample(windowed(cached(demo.model(), strategy), LOOPED))
    one_window = 16 * WINDOW * 8 * 4 * 2  # two outputs of a branch, in bytes
    assert reports.all[0].bytes_held <= 2 * 2 * 3 * one_window  # both branches, three windows, now and last time


def test_in_windows_nothing_is_repaired_and_a_word_says_so(demo, cached, reports, sample, windowed):
    off, on = (
        sample(windowed(cached(demo.model(), FirstBlockCache(repair=repair)), STATIC)) for repair in ("off", "on")
    )
    assert torch.equal(on, off) and reports.all[1].gaps_repaired == 0
    assert "context windows" in reports.all[1].unrepaired
