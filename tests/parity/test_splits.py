"""Tokens that diffusers splits at a block, and gathers anywhere: all strategies reuse what they do in one process."""

from functools import partial
from pathlib import Path

import pytest
import torch
from in_ranks import reports_of

pytest.importorskip("diffusers", reason="parity is with diffusers, which is not installed")

WORKER = Path(__file__).with_name("splits_worker.py")
JOBS = ("first block", "stack", "attention", "guidance")
MODELS = {
    2: [
        "Wan",
        "Wan, ring",
        "Wan, uneven",
        "Qwen-Image",
        "Qwen-Image, uneven",
        "HunyuanVideo",
        "LTX",
        "Flux, ring",
        "Flux.2",
    ],
    4: ["Wan, both", "Wan, uneven ring", "Qwen-Image, uneven ring"],
}
CASES = [(world, f"{model}: {job}") for world in MODELS for model in MODELS[world] for job in JOBS]
CASES += [(2, f"{model}: {job}") for model in ("Wan", "Qwen-Image") for job in ("output", "block")]


results = partial(reports_of, WORKER)


@pytest.mark.parametrize("world, case", CASES)
def test_ranks_reuse_the_share_of_one_process_and_draw_its_latent(world, case):
    ranks = results(world)
    assert not isinstance(ranks, Exception), ranks
    (expected,) = (rank[f"{case}, one process"] for rank in ranks if f"{case}, one process" in rank)
    assert expected["share"] < 0.95 and ("blocks" in expected["blocks"] or case.endswith("output"))
    latent = torch.tensor(expected["latent"])
    for split in (rank[case] for rank in ranks):
        told = ("actions", "share", "blocks", "notes")
        assert [split[each] for each in told] == [expected[each] for each in told]
        assert (torch.tensor(split["latent"]) - latent).norm() <= 1e-5 * latent.norm()
