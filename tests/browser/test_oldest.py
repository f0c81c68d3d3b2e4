"""The oldest ComfyUI that we support, with its own frontend: the same views."""

from frontend import REPORT, TIMELINE, example
from history import counts, reported, skipped


def test_the_oldest_frontend_shows_the_run_too(tab, oldest):
    frontend = tab(oldest).open()
    frontend.load(example("first_block_cache"))

    prompt_id = frontend.queue()

    totals = reported(oldest, prompt_id)["totals"]
    assert skipped(totals) > 5
    assert counts(frontend.wait_for(TIMELINE, state="finished")) == counts(totals)
    assert counts(frontend.wait_for(REPORT, state="finished")) == counts(totals)
    frontend.take_picture("oldest")
    assert not frontend.complaints_of_ours
    frontend.reload()
    assert counts(frontend.wait_for(TIMELINE, state="finished")) == counts(totals)
