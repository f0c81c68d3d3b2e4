"""Ranks of torch.distributed (gloo) that share the tokens of a picture: all decide alike."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from in_ranks import results_of

from cache_core.run.ranks import Ranks

WORKER = Path(__file__).with_name("ranks_worker.py")
LIMIT = 240  # seconds: ranks that disagree wait for each other for ever

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@cache
def results(world):
    """What each rank of a group of so many reports."""
    return results_of(WORKER, world, LIMIT)


each_world = pytest.mark.parametrize("world", [2, 4])


@each_world
@pytest.mark.parametrize("job", ["first block", "stack", "wished"])
def test_ranks_decide_and_draw_as_one_process_with_all_tokens(world, job):
    ranks = [rank[job] for rank in results(world)]
    expected = ranks[0]["expected"]
    assert all(rank["actions"] == expected["actions"] for rank in ranks)
    assert expected["actions"].count("computed") <= 12 and max(rank["error"] for rank in ranks) < 1e-5
    for rank in ranks:
        for measure, other in zip(rank["measures"], expected["measures"]):
            assert measure is other is None or math.isclose(measure, other, rel_tol=1e-3)


@each_world
def test_in_a_group_the_guard_goes_by_the_mean_and_says_so(world):
    for rank in results(world):
        assert rank["guarded"]["actions"] == rank["first block"]["actions"]
        assert any("guard goes by the main stream's mean alone" in note for note in rank["guarded"]["notes"])


@each_world
def test_without_a_group_the_same_ranks_would_disagree(world):
    decisions = {tuple(rank["each for itself"]["actions"]) for rank in results(world)}
    assert len(decisions) > 1
    assert len({tuple(rank["in a group"]["actions"]) for rank in results(world)}) == 1


@each_world
def test_a_branch_that_is_new_on_one_rank_is_computed_on_all(world):
    told = [rank["new on one rank"]["actions"] for rank in results(world)]
    computed = [[action == "computed" for action in actions] for actions in told]
    assert all(each == computed[0] for each in computed) and computed[0][6]
    assert not all(computed[0][:6]) and not all(computed[0][7:])


@each_world
def test_ranks_of_a_group_that_decided_apart_are_told_so_by_the_last(world):
    decisions = [rank["apart"]["actions"] for rank in results(world)]
    assert decisions[-1] != decisions[0] and "forecast" in decisions[0]
    told = {job for rank in results(world) for job, each in rank.items() if "decided apart" in str(each.get("notes"))}
    assert told == {"apart"}


@each_world
def test_blocks_that_one_rank_could_not_read_always_run_on_all(world):
    for rank in results(world):
        assert set(rank["misread on one rank"]["actions"]) == {"computed"}
        assert "could not be read" in " ".join(rank["misread on one rank"]["notes"])


@each_world
@pytest.mark.parametrize(
    "job, fit", [("little memory on one rank", {2: 2, 4: 1}), ("a token more on some ranks", {4: 3})]
)
def test_ranks_leave_out_the_same_sites_where_memory_is_short_on_one(world, job, fit):
    if world in fit:
        ranks = [rank[job] for rank in results(world)]
        assert all(f"{fit[world]} of 4 attentions fit" in " ".join(rank["notes"]) for rank in ranks)
        assert all(rank["share"] == ranks[0]["share"] < 1 for rank in ranks)


@each_world
def test_ranks_know_whether_they_found_the_same(world):
    assert all(rank["alike"]["alike"] == [True, False] for rank in results(world))


@each_world
def test_a_number_that_is_none_on_one_rank_is_none_on_all(world):
    for rank in results(world):
        total, largest = rank["numbers"]["total"], rank["numbers"]["largest"]
        assert total[0] == world and math.isnan(total[1])
        assert largest == [world - 1, math.inf]
        assert rank["numbers"]["given"] == 1.0  # the tensor that was given is as it was


def test_without_a_group_nothing_is_exchanged():
    part = torch.tensor([1.0, 2.0])
    assert Ranks().total(part) is part
    assert Ranks().largest([1.0, math.nan], part.device) == [1.0, math.inf]


def test_a_group_without_torch_distributed_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="init_process_group"):
        Ranks(object())
