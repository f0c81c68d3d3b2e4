"""Faster Sampling and Apply Cache Settings: what is chosen for real models, what it does, and that runs stay apart."""

from __future__ import annotations

import inspect
import io
from statistics import median
from types import SimpleNamespace

import pytest
from conftest import Reports
from PIL import Image

from cache_core.demo.server import PACK, PromptRefused
from cache_core.demo.workflows import node_id, set_inputs, workflow
from cache_core.presets import DEMO, OTHER, PRESETS, TOO_FEW_STEPS, UNET, UNPUBLISHED, VIDEO_DEMO

REPORT = "RefrainCacheReport"
SECOND = {  # a model of other weights, as the second expert of Wan 2.2 is one: 2 % smaller
    "29": {"class_type": "ModelMergeSubtract", "inputs": {"model1": ["1", 0], "model2": ["1", 0], "multiplier": 1.0}},
    "30": {"class_type": "ModelMergeSimple", "inputs": {"model1": ["1", 0], "model2": ["29", 0], "ratio": 0.98}},
}
BY_ITSELF = ("class_type", "inputs")


def preset_workflow(quality="balanced", steps=20, seed=1, told=None):
    """The workflow of First Block Cache, with a preset in its place; its words are shown by node 20.

    It is told of other steps than there are, or of none (0).
    """
    prompt = set_inputs(workflow("first_block_cache"), "KSampler", steps=steps, seed=seed)
    inputs = {"model": ["1", 0], "quality": quality, "steps": steps if told is None else told}
    preset = {"class_type": "RefrainCachePreset", "inputs": inputs}
    prompt[node_id(prompt, "RefrainFirstBlockCache")] = preset
    prompt["20"] = {"class_type": "PreviewAny", "inputs": {"source": [node_id(prompt, "RefrainCachePreset"), 2]}}
    return prompt


def words_in(prompt, entry):
    (shown,) = entry["outputs"]["20"]["text"]
    assert entry["outputs"][node_id(prompt, "RefrainCachePreset")]["text"] == [shown]
    return shown


def report_in(prompt, entry, of=None):
    (report,) = entry["outputs"][of or node_id(prompt, REPORT)]["refrain_report"]
    return report


def picture_in(prompt, entry, server):
    (image,) = entry["outputs"][node_id(prompt, "PreviewImage")]["images"]
    return Image.open(io.BytesIO(server.picture(image))).tobytes()


@pytest.mark.parametrize("quality", PRESETS[DEMO])
def test_the_demo_gets_what_was_measured_on_it_and_reuses_as_much(server, quality):
    prompt = preset_workflow(quality)
    entry = server.run(prompt)
    report, preset = report_in(prompt, entry), PRESETS[DEMO][quality]

    assert words_in(prompt, entry).startswith(f"{DEMO}, {quality}: {preset.strategy.title}")
    assert "Measured on this model" in words_in(prompt, entry)
    (strategy,) = report["strategies"]
    assert strategy["title"] == preset.strategy.title
    assert report["totals"]["reused"] + report["totals"]["forecast"] > 5
    assert 0.3 < report["totals"]["computed_share"] < 0.8


def test_few_steps_leave_the_model_as_it_is_and_say_why(server):
    prompt = preset_workflow(steps=4)
    entry = server.run(prompt)
    uncached = set_inputs(workflow("uncached"), "KSampler", steps=4)

    assert words_in(prompt, entry).startswith("With 4 steps there is nothing to reuse")
    assert "No cached sampling run" in report_in(prompt, entry)["summary"]
    assert picture_in(prompt, entry, server) == picture_in(uncached, server.run(uncached), server)


@pytest.mark.parametrize("quality", PRESETS[DEMO])
def test_few_steps_are_seen_in_the_run_which_is_then_the_uncached_one_and_says_why(server, quality):
    prompt = preset_workflow(quality, steps=4, told=0)
    entry = server.run(prompt)
    uncached = set_inputs(workflow("uncached"), "KSampler", steps=4)
    report = report_in(prompt, entry)

    assert words_in(prompt, entry).endswith("In runs of up to 8 steps everything is computed.")
    assert report["totals"]["computed"] == report["totals"]["calls"] == 4
    assert report["why_nothing"].startswith("with only 4 steps each one changes so much that skipping it would show")
    assert picture_in(prompt, entry, server) == picture_in(uncached, server.run(uncached), server)


def put_before(sampler, prompt):
    preset = {"model": sampler["inputs"]["model"], "quality": "balanced", "steps": 0}
    prompt["refrain"] = {"class_type": "RefrainCachePreset", "inputs": preset}
    sampler["inputs"]["model"] = ["refrain", 0]


def test_the_three_lines_for_other_programs_make_the_prompt_that_is_tested_here():
    _, *lines = inspect.getsource(put_before).splitlines()
    assert "\n".join(lines) in (PACK / "docs" / "workflows.md").read_text(encoding="utf-8")

    prompt, tested = workflow("uncached"), preset_workflow(told=0)
    put_before(prompt[node_id(prompt, "KSampler")], prompt)
    assert prompt["refrain"] == tested[node_id(tested, "RefrainCachePreset")]
    assert prompt[node_id(prompt, "KSampler")]["inputs"]["model"] == ["refrain", 0]


def test_steps_of_the_run_give_what_the_same_number_gave(server):
    of_run, told = preset_workflow(told=0, seed=5), preset_workflow(seed=5)
    entries = server.run(of_run), server.run(told)

    assert picture_in(of_run, entries[0], server) == picture_in(told, entries[1], server)
    ours, theirs = (report_in(prompt, entry) for prompt, entry in zip((of_run, told), entries))
    assert decisions(ours) == decisions(theirs) and ours["totals"]["steps_skipped"] > 3
    assert not [note for note in ours["notes"] + theirs["notes"] if "chosen for" in note]


def test_a_number_that_is_not_the_runs_is_kept_and_said(server):
    prompt = preset_workflow(steps=12, told=20)
    entry = server.run(prompt)

    assert report_in(prompt, entry)["totals"]["steps_skipped"] > 1
    assert [note for note in report_in(prompt, entry)["notes"] if "chosen for 20 steps, but this run has 12" in note]
    assert "This is for the 20 steps of the input steps; 0 takes them from the run." in words_in(prompt, entry)


def test_the_oldest_comfyui_knows_the_demo_too(oldest):
    prompt = preset_workflow("fast")
    entry = oldest.run(prompt)

    assert words_in(prompt, entry).startswith(f"{DEMO}, fast: TaylorSeer Cache")
    assert report_in(prompt, entry)["totals"]["computed_share"] == 0.5


def test_the_frontend_gets_the_script_that_shows_the_words(server):
    assert b"RefrainCachePreset" in server.fetch("/extensions/refrain/js/cache_preset.js")


def two_halves(source, second):
    """The first ten steps by the one model, the others by the second, each with a report."""
    prompt = workflow("uncached")
    sampler, decode = node_id(prompt, "KSampler"), node_id(prompt, "VAEDecode")
    own = prompt.pop(sampler)["inputs"]
    linked = {name: own[name] for name in ("positive", "negative")}
    both = {**linked, "noise_seed": 1, "steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10, "return_with_leftover_noise": "enable"}
    rest = {"add_noise": "disable", "start_at_step": 10, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    prompt |= {
        "2": source,
        **SECOND,
        "31": second,
        "32": {
            "class_type": "KSamplerAdvanced",
            "inputs": {**both, **first, "model": ["2", 0], "latent_image": own["latent_image"]},
        },
        "33": {"class_type": REPORT, "inputs": {"samples": ["32", 0]}},
        "34": {
            "class_type": "KSamplerAdvanced",
            "inputs": {**both, **rest, "model": ["31", 0], "latent_image": ["33", 0]},
        },
        "35": {"class_type": REPORT, "inputs": {"samples": ["34", 0]}},
    }
    prompt[decode]["inputs"]["samples"] = ["35", 0]
    return prompt


def decisions(report):
    """Step and action of each model call, and how much of it was computed."""
    return [(call["step"], call["action"], call["computed_share"]) for call in report["calls"]]


def own_node(name, cached):
    """The cache node of a workflow, on this model."""
    prompt = workflow(name)
    node = {key: prompt["2"][key] for key in BY_ITSELF}
    return {**node, "inputs": {**node["inputs"], **cached}}


FAST = {
    "first_block_cache": {"residual_diff_threshold": 0.3},
    "taylorseer": {"cache_interval": 3, "disable_cache_before_step": 2},
    "faster_cache": {},
}


@pytest.mark.parametrize("name", FAST)
def test_one_settings_node_drives_two_models_as_two_nodes_would(server, name):
    first = own_node(name, {"model": ["1", 0], **FAST[name]})
    shared = {"class_type": "RefrainApplySettings", "inputs": {"model": ["30", 0], "settings": ["2", 1]}}
    second = own_node(name, {"model": ["30", 0], **FAST[name]})
    one, two = two_halves(first, shared), two_halves(first, second)

    entries = [server.run(prompt) for prompt in (one, two)]

    for report_node in ("33", "35"):
        together, apart = (report_in(one, entry, of=report_node) for entry in entries)
        assert decisions(together) == decisions(apart)
        assert together["strategies"] == apart["strategies"]
        assert together["calls"][0]["action"] == "computed"  # nothing of the first model's run serves the second's
        assert len({call["step"] for call in together["calls"]}) == 10
        assert together["totals"]["reused"] + together["totals"]["forecast"] > 0
    assert picture_in(one, entries[0], server) == picture_in(two, entries[1], server)


def test_the_presets_settings_drive_a_second_model_too(server):
    preset = {"class_type": "RefrainCachePreset", "inputs": {"model": ["1", 0], "quality": "fast", "steps": 20}}
    shared = {"class_type": "RefrainApplySettings", "inputs": {"model": ["30", 0], "settings": ["2", 1]}}
    prompt = two_halves(preset, shared)
    entry = server.run(prompt)

    for report_node in ("33", "35"):
        report = report_in(prompt, entry, of=report_node)
        assert [strategy["title"] for strategy in report["strategies"]] == ["TaylorSeer Cache"]
        assert report["totals"]["forecast"] > 0


def test_the_settings_of_chained_nodes_are_all_handed_on(server):
    prompt = set_inputs(workflow("first_block_cache"), "KSampler", seed=8)
    sampler = node_id(prompt, "KSampler")
    prompt["30"] = own_node("faster_cache", {"model": ["2", 0]})
    prompt["31"] = {"class_type": "RefrainApplySettings", "inputs": {"model": ["1", 0], "settings": ["30", 1]}}
    prompt[sampler]["inputs"]["model"] = ["31", 0]
    report = report_in(prompt, server.run(prompt))

    assert {strategy["title"] for strategy in report["strategies"]} == {"First Block Cache", "FasterCache"}
    assert report["totals"]["computed_share"] < 0.8


def test_without_settings_the_prompt_is_refused(server):
    prompt = two_halves(
        own_node("taylorseer", {"model": ["1", 0]}),
        {"class_type": "RefrainApplySettings", "inputs": {"model": ["30", 0]}},
    )
    with pytest.raises(PromptRefused) as refused:
        server.queue(prompt)
    (error,) = refused.value.body["node_errors"]["31"]["errors"]
    assert (error["type"], error["extra_info"]["input_name"]) == ("required_input_missing", "settings")


def model_of(config, diffusion_model="WanModel"):
    """As much of a MODEL as its family is told by."""
    import comfy.supported_models

    kind = type(diffusion_model, (), {})()
    of_class = object.__new__(getattr(comfy.supported_models, config))
    return SimpleNamespace(
        get_attachment=lambda key: None, model=SimpleNamespace(model_config=of_class, diffusion_model=kind)
    )


def test_families_are_told_by_comfyuis_own_classes(comfy, demo):
    import comfy.supported_models

    from cache_core.adapters.comfyui.demo import load_video_model
    from cache_core.adapters.comfyui.families import FAMILIES, family_of

    assert set(FAMILIES.values()) | {DEMO, VIDEO_DEMO, UNET, OTHER} == set(PRESETS) | set(UNPUBLISHED)
    assert family_of(demo.model()) == family_of(demo.model().clone()) == DEMO
    assert family_of(load_video_model()) == VIDEO_DEMO
    for config, family in FAMILIES.items():
        if hasattr(comfy.supported_models, config):  # older ComfyUIs lack some
            assert family_of(model_of(config)) == family
    assert family_of(model_of("SDXL", "UNetModel")) == UNET


DERIVED = {
    "FluxSchnell": OTHER,
    "HunyuanVideoSkyreelsI2V": OTHER,
    "HunyuanVideo15": "HunyuanVideo 1.5",
    "LTXAV": "LTX-2",
    "WAN21_Vace": "Wan 2.1 and 2.2, other kinds",
    "WAN22_T2V": "Wan 2.1 and 2.2, other kinds",
}


@pytest.mark.parametrize("derived", DERIVED)
def test_a_model_derived_from_a_known_one_is_not_taken_for_it(comfy, derived):
    from cache_core.adapters.comfyui.families import family_of

    assert family_of(model_of(derived)) == DERIVED[derived]


def test_a_family_of_a_newer_comfyui_is_told_by_the_name_of_its_class():
    from cache_core.adapters.comfyui.families import family_of

    newer = SimpleNamespace(model_config=type("QwenImage21", (), {})(), diffusion_model=object())
    assert family_of(SimpleNamespace(get_attachment=lambda key: None, model=newer)) == "Qwen-Image 2.1"


@pytest.fixture(scope="module")
def few_steps(demo, scenes):
    """Sample pictures at flow shift 3 with few steps: latents, and the reports of cached runs."""
    from cache_core.adapters.comfyui import with_cache

    model, reports = demo.shifted(demo.model(), 3.0), Reports()

    def sample(strategy=None, steps=TOO_FEW_STEPS):
        cached = with_cache(model, strategy, watch=reports.watch) if strategy else model
        latents = [demo.sample(cached, [prompt], seed=seed, steps=steps) for seed, prompt in enumerate(scenes(4))]
        return latents, reports.all[-len(latents) :] if strategy else []

    return sample


@pytest.mark.parametrize("threshold", [0.08, 0.12])
def test_with_few_steps_first_block_cache_computes_them_all(few_steps, threshold):
    from cache_core.strategies.first_block import FirstBlockCache

    _, reports = few_steps(FirstBlockCache(residual_diff_threshold=threshold))
    assert [report.count("computed") for report in reports] == [TOO_FEW_STEPS] * 4


@pytest.mark.parametrize("interval", [2, 3])
def test_with_few_steps_forecasts_are_no_closer_than_fewer_steps(few_steps, interval):
    from cache_core.compare.quality import psnr
    from cache_core.demo.codec import decode
    from cache_core.strategies.taylorseer import TaylorSeerCache

    def closeness(latents):
        return median(psnr(decode(one)[0], decode(other)[0]) for one, other in zip(latents, few_steps()[0]))

    forecast, reports = few_steps(TaylorSeerCache(cache_interval=interval, few_steps="draft"))
    computed = max(report.count("computed") for report in reports)
    assert computed < TOO_FEW_STEPS
    assert closeness(forecast) < closeness(few_steps(steps=computed)[0]) + 1  # dB: level, or far below at interval 3
