"""README's "First picture", click by click, and the nodes that it shows put together by hand."""

import re

import pytest
from frontend import SEEDS, TIMELINE, example
from history import counts, outputs, reported, run_of, skipped

COMPARE, APPLY = "Compare Cache Settings", "Apply Cache Settings"
ROW = re.compile(r"^(Uncached|First Block Cache|TaylorSeer Cache).* (\d+)%", re.MULTILINE)


@pytest.fixture(scope="module")
def fresh(tab, server, renderer):
    """ComfyUI as it is opened for the first time: it shows its templates by itself."""
    return tab(server).open(renderer, **{"Comfy.TutorialCompleted": False})


@pytest.fixture(scope="module")
def first_picture(fresh, renderer):
    """The clicks of the README, until the picture is there; the id of the prompt."""
    fresh.press("refrain")
    fresh.page.get_by_text("refrain_demo_compare", exact=True).click()
    fresh.page.get_by_text("Node graph").first.wait_for(state="hidden")  # the templates are closed
    prompt_id = fresh.press_run()
    assert fresh.page.evaluate("app.canvas.ds.scale") > 0.6  # as it opened
    fresh.wait_for_sheet(COMPARE)
    fresh.page.wait_for_timeout(1000)  # the canvas is drawn again
    fresh.take_picture(f"first picture {renderer}")
    return prompt_id


@pytest.fixture(scope="module")
def computed(server, first_picture):
    """Methods in the table of the comparison, and how much each computed, in percent."""
    (table,) = set(outputs(server, first_picture, "text"))  # on both nodes, the same
    return [(method, int(percent)) for method, percent in ROW.findall(table)]


def test_the_clicks_of_the_readme_lead_to_a_picture_on_the_comparison(fresh, first_picture):
    assert fresh.in_page("showsSheet", COMPARE)


def test_the_comparison_is_one_picture_that_is_not_saved(server, first_picture):
    (picture,) = outputs(server, first_picture, "images")
    assert picture["type"] == "temp"


def test_its_table_has_the_uncached_picture_first_and_then_both_caches(computed):
    assert [method for method, _ in computed] == ["Uncached", "First Block Cache", "TaylorSeer Cache"]


def test_the_uncached_picture_was_computed_in_full(computed):
    assert dict(computed)["Uncached"] == 100


@pytest.mark.parametrize("cache", ["First Block Cache", "TaylorSeer Cache"])
def test_a_cached_picture_was_computed_by_about_half(computed, cache):
    assert 30 < dict(computed)[cache] < 70


def test_the_strips_of_both_caches_show_a_run_that_is_over(fresh, first_picture):
    first, second = fresh.numbers_of_all(TIMELINE)
    assert {first["state"], second["state"]} <= {"finished", "earlier"}


def test_the_strips_of_both_caches_show_few_computed_calls(fresh, first_picture):
    first, second = fresh.numbers_of_all(TIMELINE)
    assert int(first["computed"]) <= 12
    assert int(second["computed"]) <= 12


def test_the_page_logged_no_error_of_ours_on_the_way(fresh, first_picture):
    assert not fresh.complaints_of_ours


def test_the_button_at_the_left_edge_opens_the_templates(frontend):
    frontend.press("Templates")
    frontend.press("refrain")
    frontend.page.get_by_text("refrain_demo_compare", exact=True).wait_for()
    frontend.press("Close dialog")


@pytest.fixture
def comparison(frontend):
    """An example with a comparison in place of its sampler, added from the search and connected by hand."""
    frontend.load(example("first_block_cache"))
    frontend.add_from_search(COMPARE)
    frontend.in_page("setWidget", COMPARE, "seed", next(SEEDS))
    frontend.connect("Load Refrain Demo", "model", COMPARE, "model")
    frontend.connect("Apply First Block Cache", "model", COMPARE, "cached_1")
    frontend.connect("Positive", "CONDITIONING", COMPARE, "positive")
    frontend.connect("Negative", "CONDITIONING", COMPARE, "negative")
    frontend.connect("Empty Latent", "LATENT", COMPARE, "latent_image")
    frontend.connect("Load Refrain Demo", "vae", COMPARE, "vae")
    frontend.remove("KSampler", "RefrainCacheReport", "VAE Decode", "Enlarge to see it", "Preview Image", "What to try")


def test_a_comparison_put_together_by_hand_shows_its_picture(frontend, server, comparison):
    prompt_id = frontend.queue()

    frontend.wait_for_sheet(COMPARE)
    (picture,) = outputs(server, prompt_id, "images")
    assert picture["filename"]


def test_a_comparison_put_together_by_hand_shows_its_run_on_the_cache(frontend, server, comparison):
    prompt_id = frontend.queue()
    frontend.wait_for_sheet(COMPARE)

    shown = frontend.wait_for(TIMELINE, state="finished")
    last, *before = server.get(f"/refrain/runs?prompt_id={prompt_id}")["runs"]  # one of each round
    assert shown["run"] == last["id"] and len(before) < 3
    assert counts(shown) == counts(last["report"]["totals"])


@pytest.fixture
def applied(frontend):
    """An example whose model gets the settings of its cache node, added from the search and connected by hand."""
    frontend.load(example("first_block_cache"))
    frontend.add_from_search(APPLY)
    frontend.connect("Load Refrain Demo", "model", APPLY, "model")
    frontend.connect("Apply First Block Cache", "settings for another model", APPLY, "settings")
    frontend.connect(APPLY, "model", "KSampler", "model")


def test_settings_applied_to_another_model_show_its_run(frontend, server, applied):
    prompt_id = frontend.queue()

    shown = frontend.wait_for(TIMELINE, state="finished")
    totals = reported(server, prompt_id)["totals"]
    assert counts(shown) == counts(totals)
    assert skipped(totals) > 5


def test_the_run_belongs_to_the_node_that_applied_the_settings(frontend, server, applied):
    prompt_id = frontend.queue()
    frontend.wait_for(TIMELINE, state="finished")

    (node,) = run_of(server, prompt_id)["nodes"]
    assert frontend.in_page("typeOf", node) == "RefrainApplySettings"
