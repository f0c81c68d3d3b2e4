"""Workflows with nodes of packs that no longer work: what ComfyUI puts in their place, and with which settings."""

from __future__ import annotations

import json

import pytest

from cache_core.demo import server as comfyui
from cache_core.demo.workflows import node_id, workflow

WAVESPEED = {
    "object_to_patch": "diffusion_model",
    "residual_diff_threshold": 0.2,
    "start": 0.1,
    "end": 0.9,
    "max_consecutive_cache_hits": 2,
}
TAYLORSEER = {"model_type": "flux", "fresh_threshold": 5, "max_order": 2, "first_enhance": 4, "last_enhance": 18}
PERCENTS = {"start_percent": 0.2, "end_percent": 0.9}
CASES = {
    **{
        old: (
            "first_block_cache",
            "RefrainFirstBlockCache",
            settings,
            {
                "residual_diff_threshold": 0.12,
                **PERCENTS,
                "max_consecutive_cache_hits": -1,
                "max_order": 1,
                "guard": "mean",
                "repair": "on",
                "target_speedup": 0.0,
            },
        )
        for old, settings in {
            "TeaCache": {"model_type": "flux", "rel_l1_thresh": 0.3, **PERCENTS, "cache_device": "cuda"},
            "WanVideoTeaCacheKJ": {
                "rel_l1_thresh": 0.2,
                **PERCENTS,
                "cache_device": "offload_device",
                "coefficients": "14B",
            },
        }.items()
    },
    "ApplyFBCacheOnModel": (
        "first_block_cache",
        "RefrainFirstBlockCache",
        WAVESPEED,
        {
            "residual_diff_threshold": 0.2,
            "start_percent": 0.1,
            "end_percent": 0.9,
            "max_consecutive_cache_hits": 2,
            "max_order": 1,
            "guard": "mean",
            "repair": "on",
            "target_speedup": 0.0,
        },
    ),
    **{
        old: (
            "taylorseer",
            "RefrainTaylorSeerCache",
            TAYLORSEER,
            {
                "cache_interval": 5,
                "max_order": 2,
                "disable_cache_before_step": 4,
                "disable_cache_after_step": 18,
                "cache_level": "output",
                "spacing": "sigma",
                "memory_limit_gb": 0.0,
                "few_steps": "compute all",
                "cache_device": "auto",
                "repair": "on",
                "target_speedup": 0.0,
            },
        )
        for old in ("TaylorSeer", "TaylorSeerLite")
    },
}


def with_old_node(old, settings, meta=True):
    """A demo prompt as it was with the other pack's node."""
    name, ours, *_ = CASES[old]
    prompt = workflow(name)
    node = prompt[node_id(prompt, ours)]
    node.update(class_type=old, inputs={"model": node["inputs"]["model"], **settings})
    if not meta:
        del node["_meta"]
    return prompt


def queued(entry):
    """The prompt that was executed, nodes by id."""
    return entry["prompt"][2]


@pytest.mark.parametrize("old", CASES)
@pytest.mark.parametrize("meta", [True, False], ids=["exported", "written by hand"])
def test_an_old_node_in_a_prompt_runs_as_ours_with_its_settings(server, old, meta):
    _, ours, settings, expected = CASES[old]

    entry = server.run(with_old_node(old, settings, meta))

    ran = queued(entry)
    inputs = dict(ran[node_id(ran, ours)]["inputs"])
    assert inputs.pop("model") == ["1", 0]
    assert inputs == expected
    (report,) = [shown for output in entry["outputs"].values() for shown in output.get("refrain_report", [])]
    assert report["totals"]["reused"] + report["totals"]["forecast"] > 0


def test_an_input_that_an_older_version_of_the_pack_lacked_has_its_default(server):
    entry = server.run(with_old_node("ApplyFBCacheOnModel", {"residual_diff_threshold": 0.2}, meta=False))

    ran = queued(entry)
    inputs = ran[node_id(ran, "RefrainFirstBlockCache")]["inputs"]
    assert (inputs["start_percent"], inputs["end_percent"], inputs["max_consecutive_cache_hits"]) == (0.0, 1.0, -1)


@pytest.mark.parametrize("old", CASES)
def test_the_frontend_is_told_how_to_carry_the_widgets_of_a_saved_workflow(server, old):
    _, ours, settings, expected = CASES[old]
    (offered,) = server.get("/node_replacements")[old]
    saved = list(settings.values())  # widgets_values: by position only

    carried = {}
    for mapping in offered["input_mapping"]:
        if "set_value" in mapping:
            carried[mapping["new_id"]] = mapping["set_value"]
        elif mapping["old_id"] != "model":
            carried[mapping["new_id"]] = saved[offered["old_widget_ids"].index(mapping["old_id"])]

    assert offered["new_node_id"] == ours
    assert carried == expected
    assert {"new_id": "model", "old_id": "model"} in offered["input_mapping"]
    assert offered["output_mapping"] == [{"new_idx": 0, "old_idx": 0}]


def test_a_setting_that_ours_does_not_allow_is_refused_by_its_name(server):
    with pytest.raises(comfyui.PromptRefused) as refused:
        server.queue(with_old_node("ApplyFBCacheOnModel", {**WAVESPEED, "max_consecutive_cache_hits": 2048}))

    assert refused.value.status == 400
    assert "max_consecutive_cache_hits" in json.dumps(refused.value.body)


@pytest.mark.parametrize(
    "prompt", [{}, {"1": "text"}, {"1": {"class_type": ["TaylorSeer"], "inputs": []}}, {"1": {}}], ids=str
)
def test_a_malformed_prompt_is_refused_as_without_us(server, prompt):
    with pytest.raises(comfyui.PromptRefused) as refused:
        server.queue(prompt)

    assert refused.value.status in (400, 500)  # 500 is ComfyUI's own for nodes that are no dictionaries
    assert "on_prompt_handler" not in server.log


def test_a_comfyui_without_replacements_refuses_the_old_node_and_loads_ours(oldest):
    with pytest.raises(comfyui.PromptRefused) as refused:
        oldest.queue(with_old_node("ApplyFBCacheOnModel", WAVESPEED))

    assert refused.value.status == 400
    assert "ApplyFBCacheOnModel" in json.dumps(refused.value.body)
    assert "RefrainFirstBlockCache" in oldest.get("/object_info")
    assert "could not load" not in oldest.log
