"""diffusers' own context parallelism on two ranks (gloo): they decide alike, found out or told which they are."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from in_ranks import results_of

pytest.importorskip("diffusers", reason="parity is with diffusers, which is not installed")

WORKER = Path(__file__).with_name("ranks_worker.py")
LIMIT = 240  # seconds: ranks that disagree wait for each other for ever
WORLD = 2


@cache
def results():
    """What each rank reports."""
    return results_of(WORKER, WORLD, LIMIT)


@pytest.mark.parametrize(
    "job, same_as", [("first block", "first block"), ("output", "output"), ("given", "first block")]
)
def test_ranks_of_context_parallelism_decide_and_draw_as_one_process(job, same_as):
    for rank in results():
        split, expected = rank[job], rank[f"{same_as}, one process"]
        assert split["actions"] == expected["actions"] and split["blocks"] == expected["blocks"]
        assert {"computed"} < set(split["actions"]) and split["actions"].count("computed") <= 7
        torch.testing.assert_close(
            torch.tensor(split["latent"]), torch.tensor(expected["latent"]), rtol=1e-3, atol=1e-4
        )
        for measure, other in zip(split["measures"], expected["measures"], strict=True):
            assert measure is other is None or math.isclose(measure, other, rel_tol=1e-2)


def test_parallelism_that_comes_after_the_cache_is_refused_with_the_way_out():
    assert all("Call disable_cache" in rank["late"] for rank in results())


def test_strict_parity_is_refused_where_ranks_share_a_forward_pass():
    assert all("Leave out strict_parity" in rank["strict"] for rank in results())
