"""A ComfyUI that lacks something of docs/seams.md: the pack loads and says what, and who does not need it reuses."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
from conftest import Reports
from prompts import DEMOS

from cache_core.demo.server import PACK

OURS = set(json.loads((PACK / "node_list.json").read_text(encoding="utf-8")))
SAMPLING = {"RefrainCacheCompare", "RefrainFindSettings"}
STEPS = 12
TITLES = ("First Block Cache", "TaylorSeer Cache", "FasterCache", "Pyramid Attention Broadcast")


class Loaded:
    """The pack once more, as ComfyUI loads it: under another name, by its entry."""

    def __init__(self, name):
        spec = spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
        sys.modules[name] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
        self.name = name
        extension = asyncio.run(module.comfy_entrypoint())
        self.nodes = {each.define_schema().node_id for each in asyncio.run(extension.get_node_list())}
        self.adapter = self.module("cache_core.adapters.comfyui")
        self.strategies = {each.title: each() for each in self.module("cache_core.strategies").all_strategies()}

    def module(self, name):
        return importlib.import_module(f"{self.name}.{name}")


@pytest.fixture
def without(comfy, monkeypatch):
    """Loads the pack where ComfyUI has no such name. ComfyUI itself goes on with it, as a newer one with its own."""
    extension = comfy.patcher_extension
    classes = {
        "WrappersMP": extension.WrappersMP,
        "CallbacksMP": extension.CallbacksMP,
        "ModelPatcher": comfy.model_patcher.ModelPatcher,
    }

    def load(dotted):
        place, _, name = dotted.rpartition(".")
        with monkeypatch.context() as patch:
            patch.delattr(classes.get(place) or importlib.import_module(place), name)
            return Loaded(f"refrain_without_{name}")

    yield load
    for name in [name for name in sys.modules if name.startswith("refrain_without_")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def sampled(demo, scenes):
    """The latent and the report of a run by this strategy of a loaded pack, at its defaults but for these settings."""
    reports = Reports()

    def sample(pack, title, change=lambda model: model, **settings):
        strategy = replace(pack.strategies[title], **settings)
        model = pack.adapter.with_cache(demo.model(), strategy, watch=reports.watch)
        latent = demo.sample(change(model), scenes(1), steps=STEPS)
        return latent, reports.all[-1]

    return sample


@pytest.fixture(scope="module")
def plain(demo, scenes):
    """The latent without a cache."""
    return demo.sample(demo.model(), scenes(1), steps=STEPS)


@pytest.fixture(scope="module")
def whole(comfy):
    """The pack where nothing is missing."""
    return Loaded("refrain_with_all")


@pytest.fixture(scope="module")
def usual(whole, sampled):
    """What each strategy then does."""
    return {title: sampled(whole, title) for title in TITLES}


def reused(report):
    return report.count("reused", "forecast")


def test_where_nothing_is_missing_all_reuse(whole, usual):
    assert whole.nodes == OURS and whole.adapter.WHY_NOTHING_WORKS == ""
    assert all(reused(report) >= 3 and not report.notes for _, report in usual.values())


NEEDED_BY_ALL = (
    "WrappersMP.OUTER_SAMPLE",
    "WrappersMP.APPLY_MODEL",
    "ModelPatcher.clone",
    "ModelPatcher.add_wrapper_with_key",
    "ModelPatcher.remove_wrappers_with_key",
    "ModelPatcher.set_attachments",
    "ModelPatcher.get_attachment",
    "ModelPatcher.get_model_object",
    "comfy.model_sampling.CONST",
    "comfy.model_sampling.ModelSamplingDiscrete",
    "comfy.patcher_extension.WrappersMP",
    "comfy.model_patcher.ModelPatcher",
)


@pytest.mark.parametrize("name", NEEDED_BY_ALL)
def test_without_what_all_need_the_model_samples_as_it_is_and_one_sentence_says_why(
    without, sampled, plain, caplog, name
):
    pack = without(name)
    assert OURS - pack.nodes <= (set(DEMOS) if name.endswith(".ModelPatcher") else set())
    with caplog.at_level(logging.WARNING):
        latent, report = sampled(pack, "First Block Cache")
    assert name.rpartition(".")[2] in report.notes[0]
    assert report.notes == [pack.adapter.WHY_NOTHING_WORKS] and report.calls == []
    assert len([record for record in caplog.records if "no cache works" in record.getMessage()]) == 1
    assert (latent == plain).all()


@pytest.mark.parametrize(
    "name",
    [
        "WrappersMP.PREDICT_NOISE",  # an evaluation then begins when its branches are asked for
        "WrappersMP.PREPARE_SAMPLING",
        "CallbacksMP.ON_PRE_RUN",
        "comfy.patcher_extension.CallbacksMP",
        "comfy.model_management.InterruptProcessingException",
    ],
)
def test_without_what_none_needs_all_reuse_as_ever(without, whole, sampled, usual, name):
    pack = without(name)
    assert pack.nodes == OURS
    for title in TITLES:
        repairs = title in ("First Block Cache", "TaylorSeer Cache")
        is_unrepaired = name == "WrappersMP.PREDICT_NOISE" and repairs  # repair is at its end
        settings = {"repair": "off"} if is_unrepaired else {}
        latent, report = sampled(pack, title, **settings)
        expected, known = sampled(whole, title, **settings) if settings else usual[title]
        assert [call.action for call in report.calls] == [call.action for call in known.calls], title
        assert (latent == expected).all() and not report.notes, title


def test_without_a_wrapper_around_all_branches_only_the_negative_prompt_always_runs(without, sampled):
    pack = without("WrappersMP.CALC_COND_BATCH")
    said = pack.module("cache_core.adapters.comfyui.seams").NO_GUIDANCE
    for title in TITLES:
        report = sampled(pack, title)[1]
        assert report.notes == ([said] if title == "FasterCache" else []), title
        assert reused(report) >= 3, title
        assert [{*call.branches} for call in report.calls] == [{"positive", "negative"}] * STEPS, title


@pytest.mark.parametrize(
    "name, lacking, what",
    [
        ("comfy.sample.prepare_noise", set(), []),  # asked for when comparing
        ("comfy.samplers.KSampler", SAMPLING, ["comparing caches", "finding cache settings"]),
        ("comfy.sd.load_clip", set(), []),
        ("comfy.sd.VAE", SAMPLING, ["comparing caches", "finding cache settings"]),
        ("comfy_execution.utils.get_executing_context", set(), []),
    ],
)
def test_without_what_one_node_needs_the_other_nodes_are_there(without, sampled, caplog, name, lacking, what):
    with caplog.at_level(logging.WARNING):
        pack = without(name)
    assert OURS - pack.nodes == lacking
    said = [record for record in caplog.records if "is not possible in this ComfyUI" in record.getMessage()]
    assert len(said) == len(what) and not [record for record in said if record.exc_info]
    assert all(each in record.getMessage() for each, record in zip(what, said))
    assert reused(sampled(pack, "TaylorSeer Cache")[1]) >= 3


def test_where_free_memory_is_not_told_caches_hold_what_they_need_and_the_log_says_so(
    whole, sampled, caplog, monkeypatch
):
    room = whole.module("cache_core.adapters.comfyui.room")
    monkeypatch.setattr(room, "model_management", SimpleNamespace())
    with caplog.at_level(logging.WARNING):
        report = sampled(whole, "First Block Cache")[1]
    assert reused(report) >= 3
    assert [room.NOBODY_KNOWS in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("options", [("uuids",), ("cond_or_uncond",), ("uuids", "cond_or_uncond")], ids=" and ".join)
def test_where_branches_are_not_told_apart_they_are_by_their_order(whole, sampled, usual, comfy, options):
    kinds = comfy.patcher_extension.WrappersMP

    def lacking(model):
        def drop(executor, x, t, c_concat, c_crossattn, control, given, **conds):
            given = {name: value for name, value in given.items() if name not in options}
            return executor(x, t, c_concat, c_crossattn, control, given, **conds)

        model.add_wrapper_with_key(kinds.APPLY_MODEL, "lacking", drop)
        return model

    for title in TITLES:
        (before, known), (latent, report) = usual[title], sampled(whole, title, lacking)
        lost = 0  # a prompt that is called alone is the first by order, whichever it is: its attention is computed
        if len(options) == 2:
            lost = sum(call.attention_only and len(call.branches) == 1 for call in known.calls)
            assert (lost > 3) == (title == "FasterCache")
        assert reused(report) == reused(known) - lost, title
        if known.gaps_repaired and not report.gaps_repaired:  # what is kept may be of either prompt: it is not moved
            assert (title, len(options)) == ("TaylorSeer Cache", 2) and "can not be corrected" in report.unrepaired
            before, _ = sampled(whole, title, repair="off")
        assert ((latent - before).norm() / before.norm()).item() < 0.05, title


def test_a_context_window_that_has_no_frames_is_computed_and_said(whole, sampled, plain, comfy):
    kinds = comfy.patcher_extension.WrappersMP

    def windowed(model):
        def window(executor, x, t, c_concat, c_crossattn, control, given, **conds):
            return executor(x, t, c_concat, c_crossattn, control, given | {"context_window": object()}, **conds)

        model.add_wrapper_with_key(kinds.APPLY_MODEL, "window", window)
        return model

    latent, report = sampled(whole, "First Block Cache", windowed)
    (note,) = report.notes
    assert "such model calls are computed" in note and "index_list" in note
    assert (latent == plain).all()


def test_without_the_option_for_attention_only_caches_of_attention_compute(whole, sampled, monkeypatch):
    monkeypatch.setattr(whole.module("cache_core.adapters.comfyui.calls"), "ATTENTION", "moved")
    found = {title: sampled(whole, title)[1] for title in TITLES}
    assert reused(found["First Block Cache"]) >= 3 and reused(found["TaylorSeer Cache"]) >= 3
    report = found["Pyramid Attention Broadcast"]
    assert reused(report) == 0 and report.notes == [whole.module("cache_core.adapters.comfyui.watching").NO_ATTENTION]


@pytest.fixture
def called_otherwise(comfy, monkeypatch):
    """From now on ComfyUI gives wrappers around a function one more argument, or one of them by another name."""
    executor = comfy.patcher_extension.WrapperExecutor
    usual = executor.execute

    def otherwise(function, renamed=""):
        def execute(self, *args, **kwargs):
            if self.original.__name__ != function or not (self.is_last or self.idx == 0):
                return usual(self, *args, **kwargs)
            given = dict(zip(inspect.signature(self.original).parameters, args)) | kwargs
            if self.is_last:
                known = {name.removeprefix("new_"): value for name, value in given.items() if name != "new"}
                return self.original(**known)
            more = {} if renamed else {"new": 1}
            given = {f"new_{name}" if name == renamed else name: value for name, value in given.items()} | more
            return self.wrappers[0](self, **given)

        monkeypatch.setattr(executor, "execute", execute)

    return otherwise


WRAPPED = {"outer_sample": "sigmas", "predict_noise": "x", "_calc_cond_batch": "conds", "_apply_model": "x"}


@pytest.mark.parametrize("function", WRAPPED)
def test_one_more_argument_goes_through(whole, sampled, usual, called_otherwise, function):
    called_otherwise(function)
    for title in TITLES:
        latent, report = sampled(whole, title)
        assert (latent == usual[title][0]).all() and not report.notes, title
        assert reused(report) == reused(usual[title][1]), title


@pytest.mark.parametrize("function, name", WRAPPED.items())
def test_an_argument_by_another_name_is_a_sentence_and_only_who_needs_it_computes(
    whole, sampled, plain, called_otherwise, function, name
):
    called_otherwise(function, name)
    for title in TITLES:
        latent, report = sampled(whole, title)
        assert "this ComfyUI is not as docs/seams.md says" in report.notes[0] and f"'{name}'" in report.notes[0], title
        if function == "outer_sample" or (function == "_apply_model" and title != "FasterCache"):
            assert reused(report) == 0 and (latent == plain).all(), title
        else:
            assert reused(report) >= 3, title
