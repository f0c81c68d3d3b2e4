"""Our blueprints in the page: found by the search, put on the canvas, connected and run."""

import pytest
from frontend import example
from history import reported, skipped

SAMPLE = "Sample with a cache"
ENDED = "async prompt => prompt in (await (await fetch(`/history/${prompt}`)).json())"


@pytest.mark.parametrize("version", ["server", "newest"])
def test_a_blueprint_from_the_search_samples_with_a_cache(tab, request, version):
    server = request.getfixturevalue(version)
    page = tab(server).open()
    page.load(example("first_block_cache"))
    page.remove("KSampler", "Apply First Block Cache", "RefrainCacheReport")

    page.add_from_search(SAMPLE)
    page.connect("RefrainLoadDemo", "model", SAMPLE, "model")
    page.connect("Positive", "CONDITIONING", SAMPLE, "positive")
    page.connect("Negative", "CONDITIONING", SAMPLE, "negative")
    page.connect("Empty Latent", "LATENT", SAMPLE, "latent_image")
    page.connect(SAMPLE, "samples", "VAE Decode", "samples")
    page.in_page("setWidget", SAMPLE, "steps", 24)
    page.in_page("setWidget", SAMPLE, "cfg", 3.0)
    prompt_id = page.queue()
    page.page.wait_for_function(ENDED, arg=prompt_id)

    totals = reported(server, prompt_id)["totals"]
    assert totals["calls"] == 24 and skipped(totals) > 5
    assert not page.complaints_of_ours
