"""Classifier-free-guidance parallelism: ranks with one prompt each decide and draw as one process with both."""

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from in_ranks import reports_of

pytest.importorskip("diffusers", reason="parity is with diffusers, which is not installed")

WORKER = Path(__file__).with_name("prompts_worker.py")
THRESHOLDS = ("0.05", "0.08", "0.1", "0.12", "0.15", "0.2", "0.25", "0.3", "0.4", "0.5", "0.6")
JOBS = [(2, f"first block {threshold}") for threshold in THRESHOLDS]
JOBS += [(4, f"first block {threshold}") for threshold in THRESHOLDS[3::3]]
JOBS += [(world, job) for world in (2, 4) for job in ("stack", "attention")]
each_world = pytest.mark.parametrize("world", [2, 4])


results = partial(reports_of, WORKER)


@cache
def latents_of(world, job):
    """By one process without a cache, by one process, and by the ranks."""
    ranks = results(world)
    assert not isinstance(ranks, Exception), ranks
    one = ranks[0]["one process"]
    return [torch.tensor(told["latent"]) for told in (one["uncached"], one[job], *(rank[job] for rank in ranks))]


def distance(some, other):
    return float((some - other).norm() / other.norm())


@pytest.mark.parametrize("world, job", JOBS)
def test_ranks_with_one_prompt_each_decide_and_draw_as_one_process(world, job):
    uncached, expected, *latents = latents_of(world, job)
    one = results(world)[0]["one process"][job]
    for rank, latent in zip(results(world), latents, strict=True):
        assert rank[job]["actions"] == one["actions"][::2] and rank[job]["notes"] == one["notes"]
        assert rank[job]["share"] == one["share"] < 1
        assert distance(latent, expected) < 1e-5
        assert distance(latent, uncached) <= 1.2 * distance(expected, uncached)


@each_world
def test_faster_cache_says_that_it_does_not_estimate_a_prompt_of_another_rank(world):
    latents_of(world, "guidance")
    for rank in results(world):
        told = rank["guidance"]
        assert told["actions"] == results(world)[0]["guidance"]["actions"]
        assert told["share"] < 1 and "the negative prompt is not estimated" in " ".join(told["notes"])


def test_ranks_in_no_group_that_decided_apart_are_told_so():
    latents_of(2, "stack")
    first, second = (rank["no group"] for rank in results(2))
    assert first["actions"] != second["actions"]
    assert any("decided apart" in note for note in (*first["notes"], *second["notes"]))
    told = [note for rank in results(2) for job in ("stack", "first block 0.15") for note in rank[job]["notes"]]
    assert not any("apart" in note for note in told)


def test_the_lines_of_the_documentation_run():
    _, expected, *latents = latents_of(2, "documented")
    assert all(rank["documented"]["lines"] <= 10 for rank in results(2))
    assert max(distance(latent, expected) for latent in latents) < 1e-5


@each_world
def test_a_rank_whose_memory_runs_out_stops_and_no_other_waits_for_ever(world):
    latents_of(world, "stack")
    *others, last = (rank["failure"] for rank in results(world))
    assert "out of memory" in last["text"]
    assert all(other["text"].startswith("RuntimeError") and other["seconds"] < 60 for other in others)
    assert f"Rank {world - 1}: OutOfMemoryError" in others[0]["text"]
