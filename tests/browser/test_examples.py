"""The example workflows as they open: with the strip in it, no node lies on another."""

import json

import pytest
from frontend import ROOT

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
WINDOWS = ((1440, 900), (1920, 940))
WITH_STRIPS = (
    "RefrainFirstBlockCache",
    "RefrainTaylorSeerCache",
    "RefrainPyramidAttentionBroadcast",
    "RefrainFasterCache",
    "RefrainCachePreset",
)
OPEN = "workflow => app.loadGraphData(workflow, true, true, null, { openSource: 'template' })"
OPENED = """([count, isDrawn]) => app.graph.nodes.length === count && (!isDrawn || app.graph.nodes.every(
    (node) => document.querySelector(`[data-node-id='${node.id}']`)?.offsetHeight))"""
SEEN = """() => {
    const box = (element) => {
        const { left, top, right, bottom } = element.getBoundingClientRect()
        return [left, top, right, bottom]
    }
    const isShown = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true })
    const isLarge = (element) => isShown(element) && element.getBoundingClientRect().height > 8
    const titles = [...document.querySelectorAll("[data-node-id] [data-testid='node-title']")].filter(isLarge)
    return {
        scale: app.canvas.ds.scale,
        coarse: app.canvas.low_quality,
        strips: [...document.querySelectorAll(".refrain-timeline")].filter(isShown).map(box),
        titles: titles.map((title) => title.innerText.trim()),
        nodes: app.graph.nodes.map(({ boundingRect: [x, y, width, height] }) => {
            const { scale, offset } = app.canvas.ds
            return [[x, y], [x + width, y + height]].flat().map((at, number) => (at + offset[number % 2]) * scale)
        }),
    }
}"""
PLACES = """() => app.graph.nodes.map((node) => {
    const title = LiteGraph.NODE_TITLE_HEIGHT
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)
    const [, , width, height] = node.boundingRect // of a collapsed node, its title's
    return [node.title, node.pos[0], node.pos[1] - title, width, drawn ? drawn.offsetHeight : height]
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
def test_it_opens_at_a_size_to_read_and_no_node_lies_on_another(frontend, renderer, file):
    """Below 0.6 of its size the classic renderer draws no words and hides the strips."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    for width, height in WINDOWS:
        frontend.page.set_viewport_size({"width": width, "height": height})
        frontend.page.evaluate(OPEN, workflow)
        frontend.page.wait_for_function(OPENED, arg=[len(workflow["nodes"]), renderer == "Nodes 2.0"])
        frontend.page.evaluate(
            "() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))"
        )

        seen = frontend.page.evaluate(SEEN)
        assert 0.6 < seen["scale"] < 1, seen
        assert not seen["coarse"]
        assert len(seen["strips"]) == sum(node["type"] in WITH_STRIPS for node in workflow["nodes"]) > 0
        for left, top, right, bottom in seen["strips"] + seen["nodes"]:
            assert min(left, top) >= 0 and right <= width and bottom <= height  # in the window
            assert right - left > 60 and bottom - top > 10
        places = frontend.page.evaluate(PLACES)
        assert sorted(seen["titles"]) == ([] if renderer == "classic" else sorted(title for title, *_ in places))
        assert overlapping(places) == []
