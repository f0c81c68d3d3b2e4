"""Undo and redo make every node of a workflow anew: the views on the page are those of the new nodes."""

import pytest
from frontend import CHOICE, REPORT, TIMELINE, with_preset
from history import counts, reported, skipped


@pytest.fixture
def preset(frontend):
    """A workflow whose Faster Sampling has run once: it has all three kinds of views."""
    frontend.load(with_preset())
    frontend.queue()
    frontend.wait_for(REPORT, state="finished")
    frontend.wait_until("shows", CHOICE, "balanced")
    return frontend


@pytest.mark.parametrize("keys", [["z"], ["z", "y"], ["z", "y", "z"]], ids=["undo", "redo", "undo again"])
def test_what_was_shown_stays_and_the_next_run_is_shown(preset, server, keys):
    before, said = preset.numbers(TIMELINE), preset.page.inner_text(CHOICE)
    preset.move("KSampler")
    for key in keys:
        preset.undo(key)

    shown = preset.wait_for(TIMELINE, state="finished", run=before["run"])
    assert counts(shown) == counts(preset.wait_for(REPORT, state="finished")) == counts(before)
    assert preset.page.inner_text(CHOICE) == said

    preset.in_page("setWidget", "Faster Sampling", "quality", "visually identical")
    totals = reported(server, preset.queue())["totals"]
    assert skipped(totals) > 0 and counts(totals) != counts(before)
    preset.wait_until("shows", CHOICE, "visually identical")
    calls = {"computed": totals["computed"], "forecast": totals["forecast"]}
    assert counts(preset.wait_for(TIMELINE, state="finished", **calls)) == counts(totals)
    assert counts(preset.wait_for(REPORT, state="finished", **calls)) == counts(totals)
    for view in (TIMELINE, REPORT, CHOICE):
        assert preset.page.locator(view).count() == 1
    assert not preset.complaints_of_ours
