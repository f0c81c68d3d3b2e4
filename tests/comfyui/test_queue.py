"""Prompts queued in a real ComfyUI: the pictures, the reports, the refusals, and what stays behind."""

from __future__ import annotations

import io
import json
import re
import urllib.error

import pytest
from PIL import Image
from prompts import DEMOS

from cache_core.demo import server as comfyui
from cache_core.demo.workflows import node_id, set_inputs, workflow

CACHED = {
    "first_block_cache": "RefrainFirstBlockCache",
    "taylorseer": "RefrainTaylorSeerCache",
    "pyramid_attention_broadcast": "RefrainPyramidAttentionBroadcast",
    "faster_cache": "RefrainFasterCache",
}
ACTIONS = ("computed", "reused", "forecast")
LEVELS, SPACINGS = ["output", "model", "block", "module"], ["sigma", "steps"]
LATER = {  # optional, so that prompts saved before there were these still run
    "memory_limit_gb": (0.0, 0.0, 1000.0),
    "few_steps": ("compute all", ["compute all", "draft"]),
    "cache_device": ("auto", ["auto", "gpu", "cpu"]),
}
REPAIR, LAST = ["off", "on"], {"target_speedup": (0.0, 0.0, 5.0)}
OF_ATTENTION = {"cache_dtype": ("as computed", ["as computed", "bfloat16", "8 bit"])}
INPUTS = {  # name: (default, minimum, maximum) or (default, choices); saved workflows depend on the order
    "RefrainFirstBlockCache": {
        "residual_diff_threshold": (0.12, 0.0, 1.0),
        "start_percent": (0.0, 0.0, 1.0),
        "end_percent": (1.0, 0.0, 1.0),
        "max_consecutive_cache_hits": (-1, -1, 100),
        "max_order": (1, 0, 3),
        "guard": ("mean", ["mean", "worst frame"]),
        "repair": ("on", REPAIR),
        **LAST,
    },
    "RefrainTaylorSeerCache": {
        "cache_interval": (2, 1, 20),
        "max_order": (1, 0, 3),
        "disable_cache_before_step": (3, 0, 1000),
        "disable_cache_after_step": (-1, -1, 1000),
        "cache_level": ("output", LEVELS),
        "spacing": ("sigma", SPACINGS),
        **LATER,
        "repair": ("on", REPAIR),
        **LAST,
    },
    "RefrainPyramidAttentionBroadcast": {
        "spatial_attention_block_skip_range": (2, 1, 20),
        "temporal_attention_block_skip_range": (1, 1, 20),
        "cross_attention_block_skip_range": (1, 1, 20),
        "spatial_attention_timestep_skip_start": (100, -1, 1001),
        "spatial_attention_timestep_skip_end": (800, -1, 1001),
        "temporal_attention_timestep_skip_start": (100, -1, 1001),
        "temporal_attention_timestep_skip_end": (800, -1, 1001),
        "cross_attention_timestep_skip_start": (100, -1, 1001),
        "cross_attention_timestep_skip_end": (800, -1, 1001),
        **LATER,
        **OF_ATTENTION,
    },
    "RefrainFasterCache": {
        "spatial_attention_block_skip_range": (2, 1, 20),
        "temporal_attention_block_skip_range": (1, 1, 20),
        "spatial_attention_timestep_skip_start": (-1, -1, 1001),
        "spatial_attention_timestep_skip_end": (950, -1, 1001),
        "temporal_attention_timestep_skip_start": (-1, -1, 1001),
        "temporal_attention_timestep_skip_end": (950, -1, 1001),
        "attention_weight": (0.5, 0.0, 1.0),
        "unconditional_batch_skip_range": (2, 1, 20),
        "unconditional_batch_timestep_skip_start": (-1, -1, 1001),
        "unconditional_batch_timestep_skip_end": (950, -1, 1001),
        "alpha_low_frequency": (1.1, 0.0, 2.0),
        "alpha_high_frequency": (1.1, 0.0, 2.0),
        "low_frequency_weight_update_start": (99, -1, 1001),
        "low_frequency_weight_update_end": (901, -1, 1001),
        "high_frequency_weight_update_start": (-1, -1, 1001),
        "high_frequency_weight_update_end": (301, -1, 1001),
        **LATER,
        **OF_ATTENTION,
    },
    "RefrainCachePreset": {
        "quality": ("balanced", ["visually identical", "balanced", "fast"]),
        "steps": (0, 0, 10000),
    },
    "RefrainApplySettings": {},
    **{loader: {} for loader in DEMOS},
    "RefrainCacheReport": {},
}
LINKED = {  # the others begin with a model
    **{loader: [] for loader in DEMOS},
    "RefrainCacheReport": ["samples"],
    "RefrainApplySettings": ["model", "settings"],
}
OUTPUTS = {  # the others have a model and its settings
    **{loader: ["model", "clip", "vae"] for loader in DEMOS},
    "RefrainCacheReport": ["samples", "report", "text"],
    "RefrainApplySettings": ["model"],
    "RefrainCachePreset": ["model", "settings for another model", "choice"],
}


def report_in(entry):
    """What the only Cache Report of a prompt showed."""
    (report,) = [shown for output in entry["outputs"].values() for shown in output.get("refrain_report", [])]
    return report


def picture_in(entry, server):
    """The only picture of a prompt."""
    (image,) = [image for output in entry["outputs"].values() for image in output.get("images", [])]
    return Image.open(io.BytesIO(server.picture(image)))


def not_executed(entry):
    """The nodes whose outputs were still there from an earlier prompt."""
    (cached,) = [message[1]["nodes"] for message in entry["status"]["messages"] if message[0] == "execution_cached"]
    return set(cached)


def summaries(server):
    return re.findall(r"Refrain, .*: \d+ model calls: .*", server.log)


def without_cache(name, seed):
    """The workflow with its report still there, but the cache node unlinked."""
    prompt = set_inputs(workflow(name), "KSampler", model=["1", 0], seed=seed)
    del prompt[node_id(prompt, CACHED[name])]
    return prompt


@pytest.mark.parametrize("name", CACHED)
def test_a_workflow_gives_a_picture_and_a_report_that_adds_up(server, name):
    entry = server.run(workflow(name))
    report = report_in(entry)
    totals, calls = report["totals"], report["calls"]

    assert picture_in(entry, server).size == (512, 512)
    assert report["steps"] == 20
    assert totals["reused"] + totals["forecast"] > 5
    assert sum(totals[action] for action in ACTIONS) == totals["calls"] == len(calls)
    assert {action: totals[action] for action in ACTIONS} == {
        action: sum(call["action"] == action for call in calls) for action in ACTIONS
    }
    assert set(totals["branches"]) == {"positive", "negative"}
    for branch, counts in totals["branches"].items():
        assert sum(counts.values()) == sum(branch in call["branches"] for call in calls) >= 20
    assert totals["computed_share"] < 0.8
    assert report["summary"] in server.log


@pytest.mark.parametrize("name", CACHED)
def test_the_cached_picture_resembles_the_uncached_one(server, name):
    uncached = picture_in(server.run(workflow("uncached")), server)
    cached = picture_in(server.run(workflow(name)), server)

    pairs = list(zip(uncached.tobytes(), cached.tobytes()))
    assert 0 < sum(abs(a - b) for a, b in pairs) / len(pairs) < 4  # of 255; another seed's picture is 14 to 18 off


def test_the_report_as_text_is_the_report_in_the_node(server):
    prompt = workflow("taylorseer")
    prompt["20"] = {"class_type": "PreviewAny", "inputs": {"source": [node_id(prompt, "RefrainCacheReport"), 1]}}

    entry = server.run(prompt)

    (text,) = entry["outputs"]["20"]["text"]
    assert json.loads(text) == report_in(entry)


@pytest.mark.parametrize("node", INPUTS)
def test_a_node_has_the_inputs_that_saved_workflows_expect(server, node):
    check_contract(server, node)


def check_contract(server, node):
    info = server.get(f"/object_info/{node}")[node]
    expected = INPUTS[node]
    shown = {**info["input"].get("required", {}), **info["input"].get("optional", {})}

    assert list(shown) == LINKED.get(node, ["model"]) + list(expected)
    assert not set(LATER) & set(info["input"].get("required", {}))
    assert info["output_name"] == OUTPUTS.get(node, ["model", "settings for another model"])
    assert info["category"] == "Refrain"
    for name, (default, *allowed) in expected.items():
        kind, words = shown[name]
        choices = [words.get("options")] if kind == "COMBO" else [kind] if isinstance(kind, list) else None
        assert words["default"] == default, name
        assert (choices or [words["min"], words["max"]]) == allowed, name
        assert words["tooltip"], name


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("taylorseer", {"cache_interval": 0}),
        ("taylorseer", {"cache_interval": "often"}),
        ("taylorseer", {"cache_level": "everything"}),
        ("taylorseer", {"disable_cache_after_step": -2}),
        ("first_block_cache", {"residual_diff_threshold": 2}),
        ("first_block_cache", {"max_order": 4}),
        ("first_block_cache", {"max_consecutive_cache_hits": "many"}),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_with_the_name_of_its_input(server, name, wrong):
    prompt = set_inputs(workflow(name), CACHED[name], **wrong)

    with pytest.raises(comfyui.PromptRefused) as refused:
        server.queue(prompt)

    assert refused.value.status == 400
    errors = refused.value.body["node_errors"][node_id(prompt, CACHED[name])]["errors"]
    assert [error["extra_info"]["input_name"] for error in errors] == list(wrong)


@pytest.mark.parametrize(
    ("name", "contradiction", "remedy"),
    [
        (
            "taylorseer",
            {"disable_cache_before_step": 5, "disable_cache_after_step": 4},
            "Raise the latter, or set it to -1",
        ),
        ("first_block_cache", {"start_percent": 0.9, "end_percent": 0.5}, "lower the one or raise the other"),
        (
            "pyramid_attention_broadcast",
            {"spatial_attention_timestep_skip_start": 800, "spatial_attention_timestep_skip_end": 100},
            "set start to the lower one",
        ),
        (
            "faster_cache",
            {"unconditional_batch_timestep_skip_start": 700, "unconditional_batch_timestep_skip_end": 700},
            "set start to the lower one",
        ),
    ],
    ids=CACHED.values(),
)
def test_contradicting_settings_are_named_with_a_remedy_and_the_picture_is_the_uncached_one(
    server, name, contradiction, remedy
):
    prompt = set_inputs(workflow(name), CACHED[name], **contradiction)
    seed = prompt[node_id(prompt, "KSampler")]["inputs"]["seed"]
    report, uncached = report_in(entry := server.run(prompt)), server.run(without_cache(name, seed))

    assert report["totals"]["computed"] == report["totals"]["calls"] > 0
    assert picture_in(entry, server).tobytes() == picture_in(uncached, server).tobytes()
    why, (strategy,) = report["why_nothing"], report["strategies"]
    assert remedy in why and why == strategy["resting"]
    for setting, value in contradiction.items():
        assert re.search(rf"{setting} {value}\b", why)


@pytest.mark.parametrize(
    ("name", "setting", "value", "told"),
    [
        ("taylorseer", "disable_cache_before_step", 100, "20 steps are too few for warm-up 100 and interval 2"),
        ("first_block_cache", "start_percent", 0.99, "no step after the first is within start_percent"),
        ("pyramid_attention_broadcast", "spatial_attention_timestep_skip_end", 101, "within the timesteps to skip"),
    ],
)
def test_settings_that_leave_nothing_are_told_on_the_node(server, name, setting, value, told):
    report = report_in(server.run(set_inputs(workflow(name), CACHED[name], **{setting: value})))

    assert report["totals"]["computed"] == report["totals"]["calls"] > 0
    assert told in report["why_nothing"]


def test_a_prompt_that_needs_no_execution_still_reports(server):
    first = server.run(workflow("first_block_cache"))
    before = summaries(server)

    second = server.run(workflow("first_block_cache"))

    assert not_executed(second) == set(workflow("first_block_cache"))
    assert report_in(second) == report_in(first)
    assert summaries(server) == before


def test_a_report_without_a_cache_says_what_to_connect(server):
    report = report_in(server.run(without_cache("taylorseer", seed=77)))

    assert list(report) == ["summary"]
    assert "Connect a Refrain cache node between the model and the sampler" in report["summary"]


def test_another_seed_is_another_run_of_the_same_cached_model(server):
    server.run(workflow("first_block_cache"))

    entry = server.run(set_inputs(workflow("first_block_cache"), "KSampler", seed=2))

    assert node_id(workflow("first_block_cache"), "RefrainFirstBlockCache") in not_executed(entry)
    assert report_in(entry)["calls"][0]["action"] == "computed"


def test_an_interrupted_run_leaves_nothing_on_the_model(server):
    uncached = workflow("uncached")
    before = picture_in(server.run(uncached), server)
    summaries_before = summaries(server)
    long = set_inputs(workflow("first_block_cache"), "KSampler", steps=600)

    def interrupt_soon(event):
        if event["type"] == "progress" and event["data"]["value"] >= 8:  # some of them were reused
            server.interrupt()

    assert server.follow(server.queue(long), interrupt_soon)["type"] == "execution_interrupted"
    assert summaries(server) == summaries_before
    again = server.run(set_inputs(uncached, "KSampler", cfg=3.0 + 1e-9))  # 3 in float32, but not for ComfyUI's cache

    sampler, loader = node_id(uncached, "KSampler"), node_id(uncached, "RefrainLoadDemo")
    assert loader in not_executed(again) and sampler not in not_executed(again)
    assert picture_in(again, server).tobytes() == before.tobytes()


def test_the_log_has_one_summary_for_each_cached_sampling_run(server):
    before = len(summaries(server))

    for name in CACHED:
        server.run(set_inputs(workflow(name), "KSampler", seed=5))
    server.run(set_inputs(workflow("uncached"), "KSampler", seed=5))

    assert len(summaries(server)) == before + len(CACHED)
    assert "IMPORT FAILED" not in server.log
    assert "comfy_entrypoint" not in server.log


@pytest.mark.parametrize(
    "path", [f"docs/{node}/en.md" for node in INPUTS] + ["js/report.js", "js/timeline.js", "css/refrain.css"]
)
def test_the_frontend_gets_help_pages_and_scripts(server, path):
    try:
        assert server.fetch(f"/extensions/refrain/{path}")
    except urllib.error.HTTPError as error:
        pytest.fail(f"{path}: {error}")


@pytest.mark.parametrize("node", INPUTS)
def test_the_oldest_comfyui_has_the_same_nodes(oldest, node):
    check_contract(oldest, node)


@pytest.mark.parametrize("name", CACHED)
def test_the_oldest_comfyui_samples_with_reuse(oldest, name):
    entry = oldest.run(workflow(name))

    assert picture_in(entry, oldest).size == (512, 512)
    assert report_in(entry)["totals"]["computed"] < 20
    assert "IMPORT FAILED" not in oldest.log
