"""A group of torch.distributed on this machine: one process for each rank."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

LIMIT = 900  # seconds: ranks that disagree wait for each other for ever. Four on two busy cores take up to 250
# On busy cores torch 2.13 now and then finds a rank's heap spoilt in an exchange with another ("malloc(): unaligned
# tcache chunk detected"), which ends it by a signal. Why is not known. Only then is the whole group started again.
TRIES = 3


@cache
def reports_of(worker, world):
    """What each of so many ranks reports, for all tests of a file: a failure is not tried again for each of them."""
    try:
        return results_of(worker, world, LIMIT)
    except (AssertionError, subprocess.TimeoutExpired) as failure:
        return failure


def results_of(worker, world, limit):
    """What each of so many ranks reports: `worker rank world store file` writes JSON, within so many seconds."""
    for _ in range(TRIES):
        codes, reports = _run(worker, world, limit)
        if min(codes) >= 0:
            break
        print(f"{worker.name}: a signal ended a rank, exit codes {codes}", file=sys.stderr)
    assert codes == [0] * world, f"the ranks ended with {codes}"
    return reports


def _run(worker, world, limit):
    """The exit codes of all ranks, and their reports where all are 0."""
    paths = os.pathsep.join((str(worker.parent), str(worker.parents[2])))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONFAULTHANDLER": "1"}
    with TemporaryDirectory() as folder:
        files = [Path(folder, f"{rank}.json") for rank in range(world)]
        ranks = [
            subprocess.Popen([sys.executable, worker, str(rank), str(world), f"{folder}/store", file], env=environment)
            for rank, file in enumerate(files)
        ]
        try:
            codes = [rank.wait(limit) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        return codes, [] if any(codes) else [json.loads(file.read_text()) for file in files]
