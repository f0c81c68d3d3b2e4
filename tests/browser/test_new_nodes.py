"""New cache nodes: what they show lies inside them, and their strip is no empty box."""

import pytest

NODES = ["RefrainFirstBlockCache", "RefrainFasterCache", "RefrainCachePreset", "RefrainApplySettings"]
BEYOND = """id => {
    const node = app.graph.getNodeById(id), { scale, offset } = app.canvas.ds
    const shown = document.querySelector(`[data-node-id="${id}"]`)?.getBoundingClientRect().bottom
    const drawn = app.canvas.canvas.getBoundingClientRect().top + (node.pos[1] + node.size[1] + offset[1]) * scale
    const views = [...document.querySelectorAll(".refrain")].map((view) => view.getBoundingClientRect())
    return views.map(({ bottom, height }) => [bottom - (shown ?? drawn), height])
}"""


@pytest.mark.parametrize("kind", NODES)
def test_the_views_of_a_new_node_lie_inside_it_and_are_small(frontend, renderer, kind):
    frontend.page.evaluate("() => app.graph.clear()")
    frontend.in_page("lookAt", 0, 0)
    node = frontend.in_page("add", kind, 40, 60)
    frontend.page.wait_for_selector(".refrain")
    frontend.page.wait_for_timeout(500)  # until they have their place

    views = frontend.page.evaluate(BEYOND, node)

    frontend.take_picture(f"new {kind} {renderer}")
    assert views
    assert all(beyond <= 0 and height < 160 for beyond, height in views), views
