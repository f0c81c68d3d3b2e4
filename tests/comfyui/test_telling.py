"""Who watches a run, and who copies what it travels in: neither changes it, and neither can end it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from cache_core.run.telling import NOT_TOLD
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPT = "a big red ball at the center on a blue striped background"
STRATEGY = FirstBlockCache(residual_diff_threshold=0.3)
ERROR = KeyError("watcher")


def with_cache(*given, **named):
    from cache_core.adapters.comfyui import with_cache

    return with_cache(*given, **named)


def failing_at(place, error, told):
    """A watch that raises at one place, and otherwise notes what it is told."""

    def at(here, *what):
        told.append((here, *what))
        if here == place:
            raise error

    def watch(report):
        told.append(("report", report))
        at("began")
        return SimpleNamespace(called=lambda: at("called"), ended=lambda latent: at("ended", latent))

    return watch


@pytest.mark.parametrize("place", ["began", "called", "ended"])
def test_an_error_of_a_watcher_costs_no_picture_and_is_noted(demo, reports, place):
    told = []
    expected = demo.sample(with_cache(demo.model(), STRATEGY, watch=reports.watch), [PROMPT], steps=12)
    latent = demo.sample(with_cache(demo.model(), STRATEGY, watch=failing_at(place, ERROR, told)), [PROMPT], steps=12)

    report = dict(entry for entry in told if len(entry) == 2)["report"]
    assert torch.equal(latent, expected)
    assert report.state == "finished" and report.bytes_held == reports.all[0].bytes_held > 0
    assert [call.action for call in report.calls] == [call.action for call in reports.all[0].calls]
    assert report.count("forecast", "reused") >= 4
    assert report.notes == [*reports.all[0].notes, f"{NOT_TOLD}KeyError: 'watcher'"]


def test_an_error_of_a_watcher_at_the_end_hides_no_cancel(demo, comfy, monkeypatch):
    cancel = comfy.model_management.InterruptProcessingException
    told = []

    def stop(step, *_):
        if step == 5:
            raise cancel

    with pytest.raises(cancel):
        model = with_cache(demo.model(), STRATEGY, watch=failing_at("ended", ERROR, told))
        demo.sample(model, [PROMPT], steps=12, callback=stop)
    assert told[-1] == ("ended", None) and told[0][1].state == "stopped"


@pytest.mark.parametrize("place", ["began", "called", "ended"])
def test_a_cancel_by_a_watcher_is_a_cancel(demo, comfy, place):
    cancel = comfy.model_management.InterruptProcessingException
    with pytest.raises(cancel):
        demo.sample(with_cache(demo.model(), STRATEGY, watch=failing_at(place, cancel(), [])), [PROMPT], steps=4)


def test_a_report_that_can_not_be_closed_costs_no_picture(demo, reports, monkeypatch):
    """What is read at the end may not be readable any more."""
    model = with_cache(demo.model(), STRATEGY, watch=reports.watch)
    expected = demo.sample(model, [PROMPT], steps=12)
    monkeypatch.setattr("cache_core.report.record.CallRecord.settle", lambda self: 1 / 0)
    latent = demo.sample(model, [PROMPT], steps=12)
    assert torch.equal(latent, expected)
    assert any(NOT_TOLD in note for note in reports.all[1].notes)
    assert reports.all[1].count("forecast", "reused") == reports.all[0].count("forecast", "reused") >= 4


def by_unet_function(model):
    def copying(apply, given):
        return apply(given["input"], given["timestep"], **copy.deepcopy(given["c"]))

    model.set_model_unet_function_wrapper(copying)


def by_wrapper_of(kind):
    def put_on(model):
        from comfy.patcher_extension import WrappersMP

        def copying(executor, *args, **kwargs):
            own = lambda value: copy.deepcopy(value) if isinstance(value, dict) else value  # noqa: E731
            return executor(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

        model.add_wrapper_with_key(getattr(WrappersMP, kind), "copying", copying)

    return put_on


def by_replaced_block(model):
    def copying(args, extra):
        copy.deepcopy(args["transformer_options"])
        return extra["original_block"](args)

    model.set_model_patch_replace(copying, "dit", "double_block", 1)


COPIES = {
    "a model function": by_unet_function,
    "a wrapper around the forward pass": by_wrapper_of("APPLY_MODEL"),
    "a wrapper around the network": by_wrapper_of("DIFFUSION_MODEL"),
    "a wrapper around the evaluation": by_wrapper_of("PREDICT_NOISE"),
    "a replaced block": by_replaced_block,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "strategy",
    [STRATEGY, TaylorSeerCache(cache_interval=3), FasterCache(unconditional_batch_skip_range=3)],
    ids=lambda strategy: strategy.title,
)
def test_options_that_are_copied_in_mid_run_carry_the_run_on(demo, reports, strategy, how):
    latents = []
    for is_copied in (False, True):
        model = with_cache(demo.model(), strategy, watch=reports.watch)
        if is_copied:
            COPIES[how](model)
        latents.append(demo.sample(model, [PROMPT], steps=12))
    first, second = reports.all
    assert torch.equal(*latents)
    assert second.count("forecast", "reused") == first.count("forecast", "reused") >= 3
    assert second.notes == first.notes


def test_a_model_whose_options_are_copied_caches_and_tells(demo, reports):
    model = with_cache(demo.model(), STRATEGY, watch=reports.watch)
    model.model_options = copy.deepcopy(model.model_options)
    demo.sample(model, [PROMPT], steps=12)
    assert reports.all[0].count("forecast", "reused") >= 4
