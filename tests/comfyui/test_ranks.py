"""Processes of torch.distributed (gloo) that sample one picture, each in a ComfyUI of its own: all decide alike."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from in_ranks import reports_of

STRATEGIES = ("first block", "output", "stack", "attention", "guidance")
LONGEST_WAIT = 30  # seconds, and the group's own timeout is 10

results = partial(reports_of, Path(__file__).with_name("ranks_worker.py"), 2)


def told_of(job):
    ranks = results()
    assert not isinstance(ranks, Exception), ranks
    return [rank[job] for rank in ranks]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_that_share_tokens_decide_and_draw_as_one_process(comfy, strategy):
    expected = told_of(strategy) and results()[0][f"{strategy}, one process"]
    assert expected["share"] < 0.9 and sum(action != "computed" for action in expected["actions"]) >= 3
    for rank in told_of(strategy):
        assert [rank[each] for each in ("actions", "share", "notes")] == [
            expected[each] for each in ("actions", "share", "notes")
        ]
        for measure, other in zip(rank["measures"], expected["measures"], strict=True):
            assert measure is other is None or math.isclose(measure, other, rel_tol=1e-2)
        latent, other = torch.tensor(rank["latent"]), torch.tensor(expected["latent"])
        assert (latent - other).norm() <= 1e-4 * other.norm()


def test_in_a_group_ranks_with_other_pictures_decide_alike_and_without_one_they_do_not():
    first, second = (rank["actions"] for rank in told_of("other pictures, no group"))
    assert first != second
    first, second = (rank["actions"] for rank in told_of("other pictures"))
    assert first == second and "forecast" in first


def test_ranks_with_other_settings_than_each_other_are_refused_before_the_first_call():
    for rank in told_of("unlike"):
        assert rank["actions"] == [] and "Give all of them the same" in rank["error"]


def test_a_rank_that_waits_for_one_that_fails_stops_with_its_cause():
    waited, failed = told_of("failure")
    assert failed["error"] == "ValueError: this card fell over"
    assert waited["error"].startswith("RuntimeError: Refrain:") and "Rank 1: ValueError: this card" in waited["error"]
    assert waited["seconds"] < LONGEST_WAIT and len(waited["actions"]) >= 4


def test_a_group_without_torch_distributed_is_refused_with_what_to_do(comfy, demo):
    from cache_core.adapters.comfyui import with_cache
    from cache_core.strategies.first_block import FirstBlockCache

    with pytest.raises(ValueError, match="init_process_group"):
        with_cache(demo.model(), FirstBlockCache(), group=object())
