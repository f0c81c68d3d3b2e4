"""diffusers' own context parallelism on two ranks (gloo): they decide alike, found out or told which they are."""

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

pytest.importorskip("diffusers", reason="parity is with diffusers, which is not installed")

WORKER = Path(__file__).with_name("ranks_worker.py")
PATHS = os.environ | {"PYTHONPATH": os.pathsep.join((str(WORKER.parent), str(WORKER.parents[2])))}
LIMIT = 240  # seconds: ranks that disagree wait for each other for ever
WORLD = 2


@cache
def results():
    """What each rank reports."""
    with TemporaryDirectory() as folder:
        files = [Path(folder, f"{rank}.json") for rank in range(WORLD)]
        ranks = [
            subprocess.Popen([sys.executable, WORKER, str(rank), str(WORLD), f"{folder}/store", file], env=PATHS)
            for rank, file in enumerate(files)
        ]
        try:
            codes = [rank.wait(LIMIT) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert codes == [0] * WORLD
        return [json.loads(file.read_text()) for file in files]


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


def test_strict_parity_is_refused_where_ranks_share_a_forward_pass():
    assert all("Leave out strict_parity" in rank["strict"] for rank in results())
