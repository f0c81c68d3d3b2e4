"""A node whose cache is left out of a run says why in its own line, and what to do."""

import pytest
from frontend import TIMELINE, example

FIRST, SECOND = "Apply First Block Cache", "Apply Pyramid Attention Broadcast"
PRESET = "Faster Sampling"
CLOSED = {"spatial_attention_timestep_skip_start": 800, "spatial_attention_timestep_skip_end": 100}
LINES = "view => [...document.querySelectorAll(view)].map((each) => each.textContent)"
HEIGHTS = "view => ['scrollHeight', 'clientHeight'].map((name) => document.querySelector(view)[name])"
HEADLINE = f"{TIMELINE} .refrain-headline"


def test_settings_that_contradict_each_other_are_told_in_the_line(frontend, renderer):
    frontend.load(example("taylorseer"))
    for setting, value in {"disable_cache_before_step": 10, "disable_cache_after_step": 5}.items():
        frontend.in_page("setWidget", "Apply TaylorSeer Cache", setting, value)
    frontend.queue()

    shown = frontend.wait_for(TIMELINE, state="finished")

    assert (shown["computed"], shown["reused"], shown["forecast"]) == (shown["calls"], "0", "0")
    line = (
        "disable_cache_before_step 10 and disable_cache_after_step 5 leave no step. Raise the latter, or set it to -1"
    )
    assert frontend.line(TIMELINE) == f"Nothing skipped: {line} (never)."
    needed, there = frontend.page.evaluate(HEIGHTS, HEADLINE)
    assert needed <= there + 1  # all of it is seen
    frontend.take_picture(f"contradiction {renderer}")


@pytest.fixture
def two_caches(frontend):
    """Two caches in a row, the second with a window that no step lies in."""
    frontend.load(example("first_block_cache"))
    frontend.add_from_search(SECOND)
    frontend.connect(FIRST, "model", SECOND, "model")
    frontend.connect(SECOND, "model", "KSampler", "model")
    for setting, value in CLOSED.items():
        frontend.in_page("setWidget", SECOND, setting, value)


def test_of_two_caches_each_tells_its_own(frontend, two_caches):
    frontend.queue()
    frontend.wait_for(TIMELINE, state="finished")

    working, resting = sorted(frontend.page.evaluate(LINES, HEADLINE), key=lambda line: line.startswith("Nothing"))

    assert "steps skipped" in working
    assert resting.startswith("Nothing skipped: spatial_attention_timestep_skip_start 800 is not below")
    assert resting.endswith("set start to the lower one.")


def test_a_preset_says_why_few_steps_are_all_computed(frontend, renderer):
    frontend.load(example("first_block_cache", steps=6))
    frontend.add_from_search(PRESET)
    frontend.remove(FIRST)
    frontend.connect("Load Refrain Demo", "model", PRESET, "model")
    frontend.connect(PRESET, "model", "KSampler", "model")
    assert frontend.in_page("widgets", PRESET)["steps"] == 0
    frontend.queue()

    shown = frontend.wait_for(TIMELINE, state="finished")

    assert (shown["calls"], shown["reused"], shown["forecast"]) == ("6", "0", "0")
    assert frontend.line(TIMELINE).startswith("Nothing skipped: with only 6 steps each one changes so much")
    frontend.take_picture(f"preset {renderer}")
