"""A strip with few and wide columns: every lane, name and the legend are seen whole, and the node keeps its size."""

import pytest
from frontend import TIMELINE, example

CACHE = "Apply First Block Cache"
CUT = """view => {
    const root = document.querySelector(view), { top, bottom, left, right } = root.getBoundingClientRect()
    const parts = root.querySelectorAll(".refrain-headline, .refrain-lane > *, .refrain-line")
    const isCut = (part) => {
        const box = part.getBoundingClientRect()
        const beyond = box.bottom > bottom + 1 || box.top < top - 1 || box.right > right + 1 || box.left < left - 1
        return beyond || box.height < 6 || part.scrollWidth > part.clientWidth + 1
    }
    return [parts.length, [...parts].filter(isCut).map((part) => [part.tagName, part.textContent])]
}"""
HEIGHT = "view => document.querySelector(view).offsetHeight"


def sized(width, cfg, steps):
    workflow = example("first_block_cache", steps=steps)
    (cache,) = [node for node in workflow["nodes"] if node["type"] == "RefrainFirstBlockCache"]
    (sampler,) = [node for node in workflow["nodes"] if node["type"] == "KSampler"]
    cache["size"][0], sampler["widgets_values"][3] = width, cfg
    for node in workflow["nodes"]:
        node["pos"][0] += width if node["pos"][0] > 480 else 0
    return workflow


@pytest.mark.parametrize(("steps", "width"), [(2, 360), (4, 230), (4, 360), (8, 360), (8, 900), (20, 900)])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_nothing_of_the_strip_is_cut_and_the_node_does_not_grow(frontend, renderer, steps, width, cfg):
    frontend.load(sized(width, cfg, steps))
    frontend.wait_for(TIMELINE)
    empty = frontend.page.evaluate(HEIGHT, TIMELINE)

    frontend.queue()

    assert int(frontend.wait_for(TIMELINE, state="finished")["calls"]) == steps
    frontend.take_picture(f"{steps} steps {width} wide cfg {cfg:g} {renderer}")
    parts, cut = frontend.page.evaluate(CUT, TIMELINE)
    assert cut == []
    assert parts == 2 + (4 if cfg > 1 else 1)  # the line, the legend; two lanes with a name each, or one without
    assert frontend.page.evaluate(HEIGHT, TIMELINE) == empty


@pytest.fixture(scope="module")
def ran(tab, server):
    """A workflow that has run, to be opened in other languages."""
    frontend, workflow = tab(server).open(), sized(360, 3.0, 12)
    frontend.load(workflow)
    frontend.queue()
    frontend.wait_for(TIMELINE, state="finished")
    return frontend, workflow


@pytest.mark.parametrize("language", ["ru", "ja", "es", "zh-TW"])
def test_the_names_of_the_lanes_are_whole_in_every_language(ran, language):
    frontend, workflow = ran
    frontend.open(**{"Comfy.Locale": language})
    frontend.load(workflow)

    frontend.wait_for(TIMELINE, state="finished")

    frontend.take_picture(f"strip {language}")
    names = frontend.page.locator(f"{TIMELINE} .refrain-lane > span").all_inner_texts()
    assert len(set(names)) == 2 and "positive" not in names
    assert frontend.page.evaluate(CUT, TIMELINE)[1] == []
    frontend.open(**{"Comfy.Locale": "en"})
