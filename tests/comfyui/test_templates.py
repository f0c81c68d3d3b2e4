"""The script that puts our nodes into templates: ComfyUI accepts ours in ours, and what it refuses is seen."""

import json

import pytest
import templates
from template_prompts import nodes_of

from cache_core.demo.server import PACK

EXAMPLES = sorted((PACK / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def validating():
    with templates.served() as running:
        yield running, running.get("/object_info")


def test_our_own_examples_are_accepted_with_one_more_of_each_of_our_nodes(validating):
    server, info = validating
    checked = [templates.check(server, info, file.stem, templates.read(file)) for file in EXAMPLES]
    sampling = [each for each in checked if each]  # Compare Cache Settings samples by itself
    assert len(sampling) >= len(EXAMPLES) - 1 > 8
    assert [each.refused for each in sampling] == [[]] * len(sampling)
    assert [each.accepts for each in sampling] == [list(templates.OURS)] * len(sampling)


def test_each_of_our_nodes_is_put_before_every_sampler_and_a_report_behind(validating):
    _, info = validating
    (two,) = [file for file in EXAMPLES if "wan2_2" in file.stem]  # two experts, two samplers
    nodes = nodes_of(templates.read(two), info)
    for kind in templates.OURS:
        with_ours = templates.with_ours(nodes, kind, info)
        more = [node.kind for number, node in with_ours.items() if number not in nodes]
        assert more.count(kind) == 2
        samplers = [node for node in with_ours.values() if node.samples]
        ours = [node.inputs["model"][0] in nodes for node in samplers]
        assert ours == [kind == templates.REPORT] * 2


def test_what_comfyui_refuses_is_seen_and_a_missing_file_is_not_held_against_it(validating):
    server, info = validating
    nodes = nodes_of(templates.read(EXAMPLES[0]), info)
    assert templates.refusals(server, info, nodes) == []

    (sampler,) = [node for node in nodes.values() if node.models]
    (encoder, *_) = [number for number, node in nodes.items() if node.kind == "CLIPTextEncode"]
    sampler.inputs["model"] = [encoder, 0]
    (refused,) = templates.refusals(server, info, nodes)
    assert "MODEL" in refused and "CONDITIONING" in refused


def test_a_node_that_this_comfyui_lacks_is_stood_in_for_and_gone_after(validating):
    server, info = validating
    workflow = json.loads(json.dumps(templates.read(EXAMPLES[0])))
    newer = next(node for node in workflow["nodes"] if node["type"] == "RefrainFirstBlockCache")
    newer["type"] = "OfANewerComfyUI"
    checked = templates.check(server, info, "newer", workflow)
    assert checked.lacking == ["OfANewerComfyUI"]
    assert checked.refused == [] and checked.accepts == list(templates.OURS)
    assert "OfANewerComfyUI" not in server.get("/object_info")
