"""Tokens, or weights, that diffusers shares out among ranks: all strategies reuse what they do in one process."""

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
BROKEN = {"LTX2VideoTransformer3DModel"}  # diffusers 0.42.1 itself
OUTPUT_ONLY = {"QwenImage21Transformer2DModel"}


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
        assert (torch.tensor(split["latent"]) - latent).norm() <= 1e-5 * latent.norm()


def test_every_model_that_diffusers_shares_out_is_among_them():
    of_tokens = {type(made(denoiser)).__name__ for name, denoiser in EVEN.items() if name not in WITHOUT_A_PLAN}
    assert planned("_cp_plan") == of_tokens | BROKEN
    of_weights = {type(made(EVEN[name])).__name__ for name in WEIGHTS}
    assert planned("_tp_plan") == of_weights | OUTPUT_ONLY
