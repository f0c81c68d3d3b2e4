"""Workflows saved by an earlier version, with fewer settings on their nodes: what was set stays, the rest is usual."""

import json

import pytest
from frontend import ROOT, example

SAVED = json.loads((ROOT / "tests" / "shared" / "saved_earlier.json").read_text(encoding="utf-8"))
CACHE = "RefrainFirstBlockCache"


@pytest.mark.parametrize("name", SAVED)
def test_a_workflow_saved_earlier_opens_with_its_settings(frontend, name):
    saved, workflow = SAVED[name]["inputs"], example("first_block_cache")
    (node,) = [node for node in workflow["nodes"] if node["type"] == CACHE]
    node.update(type=name, widgets_values=list(saved.values()))  # in the order of the inputs
    node["inputs"] = [slot for slot in node["inputs"] if slot["name"] == "model"]
    frontend.load(workflow)

    prompt = frontend.page.evaluate("async () => (await app.graphToPrompt()).output")

    (given,) = [each["inputs"] for each in prompt.values() if each["class_type"] == name]
    known = frontend.server.get(f"/object_info/{name}")[name]["input"]
    usual = {setting: about[1]["default"] for setting, about in known.get("optional", {}).items()}
    assert given == {"model": given["model"], **usual, **saved}
