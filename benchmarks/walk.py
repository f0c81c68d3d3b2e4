"""Walks one reused model call through the core, and counts how often who reads along must change file.

    python benchmarks/walk.py            the counts
    python benchmarks/walk.py --steps    and every function on the way, file by file

The call is First Block Cache's on the unit tests' toy of five blocks, one branch. What counts is every Python call of a
function defined in `cache_core`; a change of file is a call in another file than the call before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
CORE = ROOT / "cache_core"
REUSED_AT = 5  # the step that is walked, of twelve


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", action="store_true", help="print every function on the way")
    calls = walk(reused_call())
    if options.parse_args().steps:
        for file, members in groupby(calls, key=lambda call: call[0]):
            print(f"{file}: {' '.join(function for _, function in members)}")
    files = {file for file, _ in calls}
    print(f"{len(calls)} calls of {len(set(calls))} functions in {len(files)} files; {changes(calls)} changes of file")


def reused_call() -> Callable[[], Any]:
    """A model call that First Block Cache will reuse, and nothing else of a run."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]
    import torch
    from toy import POSITIVE, Sampling, Toy, first_latent

    from cache_core.strategies.first_block import FirstBlockCache

    torch.set_grad_enabled(False)
    sampling, latent = Sampling(Toy(), (FirstBlockCache(residual_diff_threshold=1.0),)), first_latent()
    for index in range(REUSED_AT):
        sampling.call_on(latent, index)
    sampling.run.begin_evaluation()

    def call() -> None:
        sampling.calls({POSITIVE: latent}, REUSED_AT)
        if sampling.run.report.calls[-1].action == "computed":
            raise RuntimeError(f"The call was computed: {sampling.run.report.calls[-1].reason}.")

    return call


def walk(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """The functions of the core that run in a call, each as (file, name), in order."""
    calls: list[tuple[str, str]] = []

    def follow(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(CORE):
            calls.append((file.relative_to(CORE).as_posix(), frame.f_code.co_name))

    sys.setprofile(follow)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls


def changes(calls: list[tuple[str, str]]) -> int:
    """How often the file changes from one call to the next."""
    return len(list(groupby(file for file, _ in calls))) - 1


if __name__ == "__main__":
    main()
