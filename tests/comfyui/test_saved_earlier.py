"""Prompts saved by an earlier version, before there were the optional settings: the same calls and pictures."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from cache_core.demo.workflows import node_id, workflow

SAVED = json.loads(Path(__file__).parents[1].joinpath("shared", "saved_earlier.json").read_text(encoding="utf-8"))
"""By the node's class: its inputs, what was done in each model call (computed, reused, forecast) and the picture in
8 by 8 shades of grey, all as the earlier version had them."""


def as_saved(name):
    """The prompt as it was then; it has the other nodes still."""
    saved = SAVED[name]
    prompt = workflow(saved["workflow"])
    cache = node_id(prompt, name if name != "RefrainCachePreset" else "RefrainFirstBlockCache")
    prompt[cache] = {"class_type": name, "inputs": {"model": ["1", 0], **saved["inputs"]}}
    return prompt


@pytest.mark.parametrize("name", SAVED)
def test_a_prompt_saved_earlier_does_the_same_and_gives_the_same_picture(server, name):
    outputs = server.run(as_saved(name))["outputs"].values()
    (report,) = [report for output in outputs for report in output.get("refrain_report", [])]
    (image,) = [image for output in outputs for image in output.get("images", [])]
    picture = Image.open(io.BytesIO(server.picture(image))).convert("L").resize((8, 8), Image.Resampling.BOX)

    assert "".join(call["action"][0] for call in report["calls"]) == SAVED[name]["calls"]
    assert set(SAVED[name]["calls"]) > {"c"}  # something was skipped
    shades = zip(picture.tobytes(), SAVED[name]["picture"], strict=True)
    assert max(abs(now - then) for now, then in shades) <= 1
