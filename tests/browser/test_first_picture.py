"""README's "First picture", click by click, and the nodes that it shows put together by hand."""

import pytest
from frontend import PATIENCE, SEEDS, TIMELINE, example
from test_timeline import counts, reported, run_of

COMPARE = "RefrainCacheCompare"
IMAGE = """(type) => {
    const node = app.graph.nodes.find((node) => node.type === type)
    const images = node.imgs?.length ? node.imgs : document.querySelectorAll(`[data-node-id="${node.id}"] img`)
    return [...images].some((image) => image.naturalWidth > 500)
}"""


@pytest.fixture
def fresh(tab, server, renderer):
    """ComfyUI as it is opened for the first time: it shows its templates by itself."""
    return tab(server).open(**{"Comfy.VueNodes.Enabled": renderer == "Nodes 2.0", "Comfy.TutorialCompleted": False})


def compared(server, prompt_id):
    """The words and the pictures that a comparison left in the history."""
    outputs = server.history(prompt_id)["outputs"].values()
    tables = {text for output in outputs for text in output.get("text", [])}  # on both nodes, the same
    return tables, [image for output in outputs for image in output.get("images", [])]


def test_the_clicks_of_the_readme_lead_to_a_cached_picture_and_its_comparison(fresh, server, renderer):
    page = fresh.page
    page.get_by_role("button", name="refrain", exact=True).click()
    page.get_by_text("refrain_demo_compare", exact=True).click()
    page.get_by_text("Node graph").first.wait_for(state="hidden")  # the templates are closed
    with page.expect_response(lambda answer: answer.url.endswith("/prompt")) as answered:
        page.get_by_role("button", name="Run", exact=True).first.click()
    prompt_id = answered.value.json()["prompt_id"]

    page.wait_for_function(IMAGE, arg=COMPARE, timeout=4 * PATIENCE)  # it samples four times
    page.locator(TIMELINE).nth(1).wait_for(state="attached")
    (table,), (picture,) = compared(server, prompt_id)
    rows = [
        line for line in table.splitlines() if line.startswith(("Uncached", "First Block Cache", "TaylorSeer Cache"))
    ]
    uncached, *cached = [int(row.split("%")[0].split()[-1]) for row in rows]  # computed
    assert uncached == 100 and len(cached) == 2 and all(30 < share < 70 for share in cached)
    assert picture["type"] == "temp"
    for strip in page.locator(TIMELINE).all():
        assert strip.get_attribute("data-state") in ("finished", "earlier")
        assert int(strip.get_attribute("data-computed")) <= 12
    assert not fresh.complaints_of_ours
    fresh.look_at(430, -60)
    page.wait_for_timeout(1000)  # the canvas is drawn again
    fresh.take_picture(f"first picture {renderer}")


def test_the_button_at_the_left_edge_opens_the_templates(frontend):
    frontend.page.get_by_role("button", name="Templates").first.click()
    frontend.page.get_by_role("button", name="refrain", exact=True).click()
    frontend.page.get_by_text("refrain_demo_compare", exact=True).wait_for()
    frontend.page.get_by_role("button", name="Close dialog").click()


def test_a_comparison_added_from_the_search_and_connected_shows_its_pictures(frontend, server):
    frontend.load(example("first_block_cache"))
    frontend.add_from_search("Compare Cache Settings")
    frontend.page.evaluate(
        """(seed) => {
            const compare = app.graph.nodes.at(-1)
            compare.widgets.find((widget) => widget.name === "seed").value = seed
            const [sampler, decoder, cache] = ["KSampler", "VAEDecode", "RefrainFirstBlockCache"].map((type) =>
                app.graph.nodes.find((node) => node.type === type))
            const source = (node, slot) => {
                const link = app.graph.links.get(node.inputs[slot].link)
                return [app.graph.getNodeById(link.origin_id), link.origin_slot]
            }
            const connect = (from, name) => from[0].connect(from[1], compare, compare.findInputSlot(name))
            connect(source(cache, 0), "model")
            connect([cache, 0], "cached_1")
            for (const name of ["positive", "negative", "latent_image"])
                connect(source(sampler, sampler.findInputSlot(name)), name)
            connect(source(decoder, 1), "vae")
            const kept = new Set([compare, cache])
            for (const node of kept)  // also what is added on the way
                for (const slot of node.inputs.keys())
                    if (node.inputs[slot].link != null) kept.add(source(node, slot)[0])
            app.graph.nodes.filter((node) => !kept.has(node)).map((node) => app.graph.remove(node))
        }""",
        next(SEEDS),
    )

    prompt_id = frontend.queue()

    frontend.page.wait_for_function(IMAGE, arg=COMPARE, timeout=4 * PATIENCE)
    _, (picture,) = compared(server, prompt_id)
    assert picture["filename"]
    assert counts(frontend.wait_for(TIMELINE, state="finished")) == counts(
        run_of(server, prompt_id)["report"]["totals"]
    )


def test_settings_applied_to_another_model_show_their_run_on_the_node_that_applied_them(frontend, server):
    frontend.load(example("first_block_cache"))
    frontend.add_from_search("Apply Cache Settings")
    frontend.page.evaluate(
        """() => {
            const apply = app.graph.nodes.at(-1)
            const [demo, cache, sampler] = ["RefrainLoadDemo", "RefrainFirstBlockCache", "KSampler"].map((type) =>
                app.graph.nodes.find((node) => node.type === type))
            demo.connect(0, apply, 0)
            cache.connect(1, apply, 1)
            apply.connect(0, sampler, 0)
        }"""
    )

    prompt_id = frontend.queue()

    totals = reported(server, prompt_id)["totals"]
    assert totals["reused"] + totals["forecast"] > 5
    (node,) = run_of(server, prompt_id)["nodes"]
    assert frontend.page.evaluate("id => app.graph.getNodeById(id).type", node) == "RefrainApplySettings"
    assert counts(frontend.wait_for(f"{TIMELINE}[data-state=finished]")) == counts(totals)
