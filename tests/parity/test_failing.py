"""A rank that fails, and ranks that could never agree: all stop, with the cause, and none waits for ever."""

from functools import partial
from pathlib import Path

import pytest
from in_ranks import reports_of

pytest.importorskip("diffusers", reason="parity is with diffusers, which is not installed")

WORKER = Path(__file__).with_name("failing_worker.py")
RUNS = ["stack, computed: raises", "stack, computed: memory", "stack, reused: memory", "first block, reused: memory"]
CAUSES = {"raises": "ValueError: this card fell over", "memory": "OutOfMemoryError: CUDA out of memory."}
LONGEST_WAIT = 30  # seconds, and the group's own timeout is 15

results = partial(reports_of, WORKER, 2)


@pytest.mark.parametrize("run", RUNS)
def test_ranks_that_wait_for_one_that_fails_stop_with_its_cause(run):
    ranks = results()
    assert not isinstance(ranks, Exception), ranks
    cause, (waited, failed) = CAUSES[run.split()[-1]], (rank[run] for rank in ranks)
    assert failed["error"].startswith(cause)
    assert waited["error"].startswith("RuntimeError: Refrain:") and cause in waited["error"]
    assert "Rank 1" in waited["error"] and waited["seconds"] < LONGEST_WAIT
    assert waited["actions"] == failed["actions"] and len(failed["actions"]) >= 4
    assert "computed" in run or {"reused", "forecast"} & set(failed["actions"])


@pytest.mark.parametrize("what", ["thresholds", "strategies"])
def test_ranks_with_other_settings_than_each_other_are_refused_in_the_first_call(what):
    ranks = results()
    assert not isinstance(ranks, Exception), ranks
    for told in (rank[what] for rank in ranks):
        assert told["actions"] == [] and "Give all of them the same" in told["error"]


@pytest.mark.parametrize("job", ["stack", "first block"])
def test_after_that_they_decide_alike_whether_their_group_is_found_or_told(job):
    told = [rank[f"{job}, {how}"]["actions"] for rank in results() for how in ("found", "told")]
    assert all(actions == told[0] for actions in told) and told[0].count("computed") <= 11


def test_parallelism_that_comes_after_the_cache_is_refused_with_the_way_out():
    assert all("Call disable_cache" in rank["late"] for rank in results())


def test_strict_parity_is_refused_where_ranks_share_a_forward_pass():
    assert all("Leave out strict_parity" in rank["strict"] for rank in results())
