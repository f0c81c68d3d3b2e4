"""A strip with few and wide columns: every lane, name and the legend are seen whole, and the node keeps its size."""

import pytest
from frontend import TIMELINE, example

CACHE = "Apply First Block Cache"
CUT = """view => {
    const root = document.querySelector(view), { top, bottom, left, right } = root.getBoundingClientRect()
    const parts = root.querySelectorAll(".refrain-headline, .refrain-legend:not(:empty), .refrain-lane > *")
    const isCut = (part) => {
        const box = part.getBoundingClientRect()
        const beyond = box.bottom > bottom + 1 || box.top < top - 1 || box.right > right + 1 || box.left < left - 1
        const isHidden = part.scrollWidth > part.clientWidth + 1 || part.scrollHeight > part.clientHeight + 1
        return beyond || box.height < 6 || (!(part instanceof SVGElement) && isHidden)
    }
    return [parts.length, [...parts].filter(isCut).map((part) => [part.tagName, part.textContent])]
}"""
HEIGHT = "view => document.querySelector(view).offsetHeight"
SIZE = "type => { const n = app.graph.nodes.find((node) => node.type === type); return [...n.size] }"


def sized(width, cfg, steps):
    workflow = example("first_block_cache", steps=steps)
    (cache,) = [node for node in workflow["nodes"] if node["type"] == "RefrainFirstBlockCache"]
    (sampler,) = [node for node in workflow["nodes"] if node["type"] == "KSampler"]
    (latent,) = [node for node in workflow["nodes"] if node["type"] == "EmptySD3LatentImage"]
    latent["widgets_values"][:2] = 64, 64  # pixels: what is looked at is the strip
    cache["size"][0], sampler["widgets_values"][3] = width, cfg
    for node in workflow["nodes"]:
        node["pos"][0] += width if node["pos"][0] > 480 else 0
    return workflow


@pytest.mark.parametrize(
    ("steps", "width"), [(1, 360), (2, 360), (4, 230), (4, 360), (8, 360), (8, 900), (20, 360), (300, 360)]
)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_nothing_of_the_strip_is_cut_and_the_node_does_not_grow(frontend, renderer, steps, width, cfg):
    frontend.load(sized(width, cfg, steps))
    frontend.wait_for(TIMELINE)
    empty = frontend.page.evaluate(HEIGHT, TIMELINE), frontend.page.evaluate(SIZE, "RefrainFirstBlockCache")
    assert frontend.line(TIMELINE) == "Press Run: one bar for each step appears here."

    frontend.queue()

    assert int(frontend.wait_for(TIMELINE, state="finished")["calls"]) == steps
    frontend.take_picture(f"{steps} steps {width} wide cfg {cfg:g} {renderer}")
    parts, cut = frontend.page.evaluate(CUT, TIMELINE)
    assert cut == []
    has_legend = frontend.page.locator(f"{TIMELINE} .refrain-legend:not(:empty)").count()  # none where all is computed
    assert parts == 1 + has_legend + (4 if cfg > 1 else 1)  # the line; two lanes with a name each, or one without
    sizes = frontend.page.evaluate(HEIGHT, TIMELINE), frontend.page.evaluate(SIZE, "RefrainFirstBlockCache")
    assert sizes == empty
