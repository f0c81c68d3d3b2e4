"""Prompts saved by an earlier version, before there were the optional settings: the same calls and pictures.

An optional setting that a prompt lacks has its usual value, which may be another than when it came: see `USUAL_BEFORE`.
"""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from cache_core.demo.workflows import node_id, set_inputs, workflow

SAVED = json.loads(Path(__file__).parents[1].joinpath("shared", "saved_earlier.json").read_text(encoding="utf-8"))
"""By the node's class: its inputs, what was done in each model call (computed, reused, forecast) and the picture in
8 by 8 shades of grey, all as the earlier version (50f47df) had them, with the weights of today's demo."""

PROMPT = "a big red ball at the center on a blue striped background"
GIVEN = [name for name in SAVED if "picture" in SAVED[name]]  # Faster Sampling gives what is measured by today
USUAL_BEFORE = {"RefrainFirstBlockCache": {"repair": "off"}}  # what is on today


def as_saved(name, **settings):
    """The prompt as it was then, and these settings; it has the other nodes still."""
    saved = SAVED[name]
    prompt = set_inputs(workflow(saved["workflow"]), "EmptySD3LatentImage", width=64, height=64)
    prompt[prompt[node_id(prompt, "KSampler")]["inputs"]["positive"][0]]["inputs"]["text"] = PROMPT
    cache = node_id(prompt, name if name != "RefrainCachePreset" else "RefrainFirstBlockCache")
    prompt[cache] = {"class_type": name, "inputs": {"model": ["1", 0], **saved["inputs"], **settings}}
    return prompt


def report_in(outputs):
    (report,) = [report for output in outputs for report in output.get("refrain_report", [])]
    return report


@pytest.mark.parametrize("name", GIVEN)
def test_a_prompt_saved_earlier_does_the_same_and_gives_the_same_picture(server, name):
    outputs = server.run(as_saved(name, **USUAL_BEFORE.get(name, {})))["outputs"].values()
    report = report_in(outputs)
    (image,) = [image for output in outputs for image in output.get("images", [])]
    picture = Image.open(io.BytesIO(server.picture(image))).convert("L").resize((8, 8), Image.Resampling.BOX)

    assert "".join(call["action"][0] for call in report["calls"]) == SAVED[name]["calls"]
    assert set(SAVED[name]["calls"]) > {"c"}  # something was skipped
    shades = zip(picture.tobytes(), SAVED[name]["picture"], strict=True)
    assert max(abs(now - then) for now, then in shades) <= 1


def test_a_prompt_saved_before_there_was_repair_is_repaired(server):
    report = report_in(server.run(as_saved("RefrainFirstBlockCache"))["outputs"].values())
    assert report["totals"]["gaps_repaired"] >= 3
