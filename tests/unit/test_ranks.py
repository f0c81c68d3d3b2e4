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
@pytest.mark.parametrize("job", ["first block", "stack"])
def test_ranks_decide_and_draw_as_one_process_with_all_tokens(world, job):
    ranks = [rank[job] for rank in results(world)]
    expected = ranks[0]["expected"]
    assert all(rank["actions"] == expected["actions"] for rank in ranks)
    assert expected["actions"].count("computed") <= 12 and max(rank["error"] for rank in ranks) < 1e-5
    for rank in ranks:
        for measure, other in zip(rank["measures"], expected["measures"]):
            assert measure is other is None or math.isclose(measure, other, rel_tol=1e-3)


@each_world
def test_without_a_group_the_same_ranks_would_disagree(world):
    decisions = {tuple(rank["each for itself"]["actions"]) for rank in results(world)}
    assert len(decisions) > 1
    assert len({tuple(rank["in a group"]["actions"]) for rank in results(world)}) == 1


@each_world
def test_blocks_that_one_rank_could_not_read_always_run_on_all(world):
    for rank in results(world):
        assert set(rank["misread on one rank"]["actions"]) == {"computed"}
        assert "could not be read" in " ".join(rank["misread on one rank"]["notes"])


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
