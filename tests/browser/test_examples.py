"""The example workflows as they open: with the strip in it, no node lies on another."""

import json

import pytest
from frontend import ROOT

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
PLACES = """() => app.graph.nodes.map((node) => {
    const title = LiteGraph.NODE_TITLE_HEIGHT
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)
    const height = drawn ? drawn.offsetHeight : node.size[1] + title
    return [node.title, node.pos[0], node.pos[1] - title, node.size[0], height]
})"""


def overlapping(places):
    return [
        (one, other)
        for number, (one, x, y, width, height) in enumerate(places)
        for other, left, top, wide, high in places[number + 1 :]
        if x < left + wide and left < x + width and y < top + high and top < y + height
    ]


def test_the_rule_sees_what_overlaps():
    assert overlapping([("a", 0, 0, 10, 10), ("b", 9, 9, 5, 5), ("c", 10, 0, 5, 5)]) == [("a", "b")]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_no_node_lies_on_another(frontend, renderer, file):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    frontend.load(workflow)
    frontend.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    if renderer == "Nodes 2.0":
        drawn = (
            "() => app.graph.nodes.every((node) => document.querySelector(`[data-node-id='${node.id}']`)?.offsetHeight)"
        )
        frontend.page.wait_for_function(drawn)
    frontend.page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")

    assert overlapping(frontend.page.evaluate(PLACES)) == []
