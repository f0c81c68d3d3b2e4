"""Whether a model call goes on: with the evaluation, and with the picture that its branches were asked about before.

A prompt and a shape do not tell. Tiles that move from step to step have both alike, and so have two pictures that are
sampled in turns. Strategies that trust the schedule would forecast one from the other.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..model import flattened
from ..strategy import is_same
from .path import ANOTHER, DOUBTFUL, LatentPath
from .reading import SigmaReading
from .state import CallState, RunState

FEW_TIMES = 3
ANOTHER_LATENT = (
    "the model is asked about another picture, or another place in it, than the step before (tiles that move, several "
    "pictures in turns), so what was kept can't be reused: give each a sampling run of its own, or use tiles that stay"
)


def begin_unasked(run: RunState, sigma: Tensor, contexts: Sequence[Hashable]) -> None:
    """Begin an evaluation for a host that begins none: with another sigma, or with a branch that was seen."""
    evaluation, reading = run.evaluation, SigmaReading(sigma, run.terms.schedule, run.paths)
    is_seen = any((context, 0) in evaluation.contexts for context in contexts)
    if is_seen or evaluation.sigma is None or not is_same(evaluation.sigma.value, reading.value):
        run.begin_evaluation(reading)
        run.is_evaluating = False


def follow(call: CallState, latent: Tensor | None) -> list[LatentPath]:
    """The paths of the call's branches, which have come to this latent. What is kept of another one is dropped."""
    run, count = call.run, len(call.contexts)
    if not run.paths.are_followed or not isinstance(latent, Tensor) or not latent.ndim or latent.shape[0] % count:
        return []
    with run.paths.lock:
        known = run.paths.of
        are_known = all(context in known for context in call.contexts)
        paths = [known.setdefault(context, LatentPath()) for context in call.contexts]
        for path, part in zip(paths, latent.chunk(count)):
            path.reaches(part)
    if are_known:
        call.sigma.read()
        most, whole = DOUBTFUL if run.others_seen else ANOTHER, run.paths.whole
        others = [c for c, path in zip(call.contexts, paths) if path.novelty > most and not _is_whole(path, whole)]
        if others:
            run.memories.forget(others)
            run.others_seen += 1
        if run.others_seen >= FEW_TIMES:
            run.report.note(ANOTHER_LATENT)
    return paths


def go_on(run: RunState, paths: list[LatentPath], output: Any) -> None:
    """The call has given this output: one prediction for each of its branches."""
    found, _ = flattened(output)
    if found and found[0].ndim and found[0].shape[0] % len(paths) == 0:
        with run.paths.lock:
            for path, part in zip(paths, found[0].chunk(len(paths))):
                path.predicted(part)


def _is_whole(path: LatentPath, whole: LatentPath) -> bool:
    """Whether this is just what the sampler has, and was, of one picture: then it goes on, whatever noise was added."""
    if whole.latent is None or whole.before is None or whole.goes_on_from_before:
        return False
    return np.array_equal(whole.latent, path.latent) and np.array_equal(whole.before, path.before)
