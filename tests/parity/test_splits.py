"""Tokens, or weights, that diffusers shares out among ranks: all strategies reuse what they do in one process."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from in_ranks import reports_of

pytest.importorskip("diffusers", reason="parity is with diffusers, which is not installed")

from diffusers.models import transformers
from models import made
from planned import EVEN
from splits_worker import WEIGHTS, cases

WORKER = Path(__file__).with_name("splits_worker.py")
CASES = [(world, f"{model}, {way}: {job}") for world in (2, 4) for model, way, job in cases(world)]
WITHOUT_A_PLAN = {"HunyuanVideo"}
WITH_A_PREFIX = {"QwenImage21Transformer2DModel"}  # whose output holds more than the latent


results = partial(reports_of, WORKER)


def planned(kind):
    """The models of diffusers that have such a plan."""
    return {name for name in dir(transformers) if getattr(getattr(transformers, name), kind, None)}


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
        for measure, other in zip(split["measures"], expected["measures"], strict=True):
            assert measure is other is None or math.isclose(measure, other, rel_tol=1e-2)
        assert (torch.tensor(split["latent"]) - latent).norm() <= 1e-5 * latent.norm()


def test_every_model_that_diffusers_shares_out_is_among_them():
    of_tokens = {type(made(denoiser)).__name__ for name, denoiser in EVEN.items() if name not in WITHOUT_A_PLAN}
    assert planned("_cp_plan") == of_tokens
    of_weights = {type(made(EVEN[name])).__name__ for name in WEIGHTS}
    assert planned("_tp_plan") == of_weights | WITH_A_PREFIX
