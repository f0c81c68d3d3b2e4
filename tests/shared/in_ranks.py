"""A group of torch.distributed on this machine: one process for each rank."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

LIMIT = 900  # seconds: ranks that disagree wait for each other for ever. Four on two busy cores take up to 300


@cache
def reports_of(worker, world):
    """What each of so many ranks reports, for all tests of a file: a failure is not tried again for each of them."""
    try:
        return results_of(worker, world, LIMIT)
    except (AssertionError, subprocess.TimeoutExpired) as failure:
        return failure


def results_of(worker, world, limit):
    """What each of so many ranks reports: `worker rank world store file` writes JSON, within so many seconds."""
    paths = os.environ | {"PYTHONPATH": os.pathsep.join((str(worker.parent), str(worker.parents[2])))}
    with TemporaryDirectory() as folder:
        files = [Path(folder, f"{rank}.json") for rank in range(world)]
        ranks = [
            subprocess.Popen([sys.executable, worker, str(rank), str(world), f"{folder}/store", file], env=paths)
            for rank, file in enumerate(files)
        ]
        try:
            codes = [rank.wait(limit) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert codes == [0] * world
        return [json.loads(file.read_text()) for file in files]
