"""The strip on a cache node: filled live, the same numbers as in the history, in every renderer, graph and tab."""

import re

import pytest
from frontend import REPORT, TIMELINE, example
from history import COUNTS, counts, reported, run_of, skipped

NODES = {
    "first_block_cache": "RefrainFirstBlockCache",
    "taylorseer": "RefrainTaylorSeerCache",
    "pyramid_attention_broadcast": "RefrainPyramidAttentionBroadcast",
    "faster_cache": "RefrainFasterCache",
}


GAIN = re.compile(r"(?:About ([\d.]+)x|No) faster: (\d+) of 20 steps skipped(?: in part)?(?:, (\d+) in part)?\b")


def says_what_was_gained(line, totals):
    """Whether these are the report's numbers, in words."""
    times, *steps = GAIN.match(line).groups()
    counted = [count for count in (totals["steps_skipped"], totals["steps_in_part"]) if count]
    is_faster = totals["speed_up"] >= 1.05 - 1e-9
    assert abs(float(times) - totals["speed_up"]) < 0.051 if is_faster else times is None
    return [int(count) for count in steps if count] == counted


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
    assert says_what_was_gained(frontend.line(TIMELINE), totals)
    assert not frontend.complaints_of_ours
    frontend.take_picture(f"{name} {renderer}")
