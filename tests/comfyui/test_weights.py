"""Weights that are cast, dequantised, patched or fetched when a layer runs: for blocks that are left out, none is."""

import pytest
import torch
from kept_weights import BLOCKS, MODELS
from watched_weights import Streamed, count_casts
from zoo import all_architectures
from zoo.sampling import count_runs

from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPT = "a big red ball at the center on a blue striped background"
CHAINS = ("double_blocks", "single_blocks")
FIRST_BLOCK = FirstBlockCache(residual_diff_threshold=0.3)
OUTPUT, MODEL, BLOCK = (TaylorSeerCache(cache_interval=3, cache_level=level) for level in ("output", "model", "block"))
OFF = [TaylorSeerCache(cache_interval=1), FirstBlockCache(residual_diff_threshold=1e-9)]  # the latter is never met
STREAMING = {"LTX-2": "transformer_blocks", "MiniMax-H3": "blocks"}

each_kind = pytest.mark.parametrize("model", MODELS, indirect=True)
each_streaming = pytest.mark.parametrize("streamed", STREAMING, indirect=True)


def with_each(*strategies):
    return pytest.mark.parametrize(
        "strategy", strategies, ids=lambda strategy: f"{strategy.title}, {strategy.levels[0]}"
    )


@pytest.fixture
def model(request, demo, monkeypatch):
    """The demo model, its weights kept in one of the forms of kept_weights.py."""
    return MODELS[request.param](demo, monkeypatch)


@pytest.fixture
def streamed(request, comfy, monkeypatch):
    (architecture,) = [found for found in all_architectures() if found.name == request.param]
    return Streamed(architecture, STREAMING[request.param], monkeypatch)


@each_kind
@with_each(FIRST_BLOCK, OUTPUT, MODEL, BLOCK)
def test_blocks_that_are_left_out_have_no_weights_cast(demo, cached, reports, monkeypatch, model, strategy):
    casts, runs = count_casts(model, monkeypatch), count_runs(model.model.diffusion_model, CHAINS, monkeypatch)
    plain = demo.sample(model, [PROMPT], steps=1)
    for_one_run = dict(casts)
    assert all(for_one_run[block] >= 3 for block in BLOCKS)

    casts.clear(), runs.clear()
    latent = demo.sample(cached(model, strategy), [PROMPT], steps=12)

    assert torch.isfinite(plain).all() and torch.isfinite(latent).all()
    assert reports.all[-1].count("reused", "forecast") >= 4
    assert 12 > runs[BLOCKS[-1]] >= 4
    assert {block: casts[block] for block in BLOCKS} == {block: for_one_run[block] * runs[block] for block in BLOCKS}


@each_kind
@with_each(*OFF)
def test_off_settings_change_nothing_whatever_the_weights_are_kept_in(demo, cached, model, strategy):
    plain = demo.sample(model, [PROMPT], steps=4)
    assert torch.equal(demo.sample(cached(model, strategy), [PROMPT], steps=4), plain)


def test_weights_that_leave_the_device_in_mid_run_change_nothing(demo, cached, reports):
    from cache_core.adapters.comfyui.demo import load_model

    model = cached(load_model(), FIRST_BLOCK)
    undisturbed = demo.sample(model, [PROMPT], steps=12)
    left = []

    def free_the_device(step, *_):
        if step == 5:  # as another model that is loaded for a preview makes ComfyUI do
            left.append(model.partially_unload(torch.device("cpu"), 1e32))

    latent = demo.sample(model, [PROMPT], steps=12, callback=free_the_device)
    assert left == [pytest.approx(left[0])] and left[0] > 0
    assert torch.equal(latent, undisturbed)
    assert reports.all[0].count("forecast") == reports.all[1].count("forecast") >= 4


@each_streaming
@with_each(FIRST_BLOCK, OUTPUT, MODEL, BLOCK)
def test_blocks_are_left_out_where_weights_are_streamed(cached, reports, streamed, strategy):
    latent = streamed.sample(cached(streamed.model, strategy))
    (report,) = reports.all
    assert len(report.calls) - report.count("computed") >= 6
    assert all(torch.isfinite(part).all() for part in latent.unbind())


@each_streaming
@with_each(OUTPUT)
def test_blocks_that_are_left_out_are_not_fetched_ahead(cached, reports, streamed, strategy):
    streamed.sample(cached(streamed.model, strategy))
    assert set(streamed.fetches) == {reports.all[0].count("computed")}


@each_streaming
@with_each(FIRST_BLOCK, MODEL)
def test_where_the_first_block_decides_it_alone_is_always_fetched(cached, reports, streamed, strategy):
    streamed.sample(cached(streamed.model, strategy))
    (report,) = reports.all
    first, *others = streamed.fetches
    rehearsals = first - len(report.calls)  # the question comes while it is on its way, in those too
    assert 1 <= rehearsals <= 2  # two where there is more than one stream
    assert set(others) == {report.count("computed")}


@each_streaming
@with_each(BLOCK)
def test_blocks_that_are_left_out_one_by_one_are_fetched_and_the_report_says_so(cached, reports, streamed, strategy):
    streamed.sample(cached(streamed.model, strategy))
    (report,) = reports.all
    assert set(streamed.fetches) == {len(report.calls)}
    assert any("fetches each block's weights" in note for note in report.notes)
