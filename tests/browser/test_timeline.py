"""The strip on a cache node: filled live, the same numbers as in the history, in every renderer, graph and tab."""

import pytest
from frontend import REPORT, TIMELINE, example
from history import COUNTS, counts, reported, run_of, skipped

NODES = {
    "first_block_cache": "RefrainFirstBlockCache",
    "taylorseer": "RefrainTaylorSeerCache",
    "pyramid_attention_broadcast": "RefrainPyramidAttentionBroadcast",
    "faster_cache": "RefrainFasterCache",
}


@pytest.mark.parametrize("name", NODES)
def test_the_strip_fills_to_the_counts_of_the_history(frontend, server, renderer, name):
    frontend.load(example(name))

    prompt_id = frontend.queue()
    shown = frontend.wait_for(TIMELINE, state="finished")

    report = reported(server, prompt_id)
    totals = report["totals"]
    assert skipped(totals) > 5
    assert counts(shown) == counts(totals) == counts(run_of(server, prompt_id)["report"]["totals"])
    by_branch = {name: sum(branch[name] for branch in totals["branches"].values()) for name in COUNTS}
    assert frontend.cells(TIMELINE) == by_branch
    assert counts(frontend.wait_for(REPORT, state="finished")) == counts(totals)
    assert frontend.cells(REPORT) == by_branch
    words = frontend.line(TIMELINE)
    assert words.startswith("20 steps") and f"{totals['speed_up']:.2f}x measured" in words
    assert not frontend.complaints_of_ours
    frontend.take_picture(f"{name} {renderer}")
