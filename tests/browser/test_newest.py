"""The newest frontend on the newest ComfyUI: the same views, and the same nodes found."""

import pytest
from frontend import REPORT, TIMELINE, example
from history import counts, reported, skipped
from test_search import found


@pytest.fixture(scope="module")
def page(tab, newest, renderer):
    return tab(newest).open(renderer)


@pytest.mark.parametrize("name", ["first_block_cache", "taylorseer"])
def test_the_newest_frontend_shows_the_run_too(page, newest, renderer, name):
    page.load(example(name))

    prompt_id = page.queue()

    totals = reported(newest, prompt_id)["totals"]
    assert skipped(totals) > 5
    assert counts(page.wait_for(TIMELINE, state="finished")) == counts(totals)
    assert counts(page.wait_for(REPORT, state="finished")) == counts(totals)
    page.take_picture(f"newest {name} {renderer}")
    assert not page.complaints_of_ours


def test_the_newest_frontend_finds_cache_preset_first(page):
    assert found(page, "speed up")[0].startswith("Faster Sampling")
