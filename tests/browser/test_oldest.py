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


def test_in_the_oldest_frontend_too_a_bypassed_cache_shows_an_earlier_run(tab, oldest):
    frontend = tab(oldest).open()
    frontend.load(example("first_block_cache"))
    frontend.queue()
    before = frontend.wait_for(TIMELINE, state="finished")
    frontend.wait_for(REPORT, state="finished")
    frontend.in_page("setMode", "Apply First Block Cache", "bypassed")

    frontend.queue()

    assert frontend.wait_for(TIMELINE, state="old")["run"] == before["run"]
    frontend.wait_for(REPORT, state="none")
    assert "is bypassed or muted" in frontend.page.inner_text(REPORT)
    assert not frontend.complaints_of_ours
