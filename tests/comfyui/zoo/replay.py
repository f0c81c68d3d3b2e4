"""A model that is evaluated several times for the same inputs: once computed, then reused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from conftest import Reports

from cache_core.strategy.forecast import History
from cache_core.strategy.strategy import COMPUTE, FIRST_BLOCK, Strategy

from .sampling import Specimen

EVALUATIONS = 4


@dataclass(frozen=True)
class Replay(Strategy):
    """Computes, then reuses: what comes out for the same inputs must be the same."""

    probes: bool = False
    title = "Replay"
    levels = ("model",)

    @property
    def tests_first_block(self):
        return self.probes

    def new_state(self, site):
        return History(capacity=1)

    def around(self, call, state):
        if self.probes:
            yield FIRST_BLOCK
        if call.may_reuse:
            return state.combined([1.0])
        state.add(0.0, (yield COMPUTE))


@dataclass
class Replayed:
    """What was seen of the last evaluation."""

    error: float  # relative, of its prediction to that of the first
    blocks: Counter  # that ran in it
    report: Any

    @property
    def calls(self) -> int:
        """Of the model, in one evaluation."""
        return max(1, len(self.report.calls) // EVALUATIONS)


def replayed(specimen: Specimen, model: Any, strategy: Strategy) -> Replayed:
    """Evaluates the specimen's model, or a clone of it with something added, with this strategy."""
    import comfy.sample
    import comfy.samplers

    from cache_core.adapters.comfyui import with_cache

    architecture, predictions, reports = specimen.architecture, [], Reports()

    def evaluate(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        for _ in range(EVALUATIONS):
            specimen.blocks.clear()
            predictions.append(x - denoiser(x.clone(), sigmas[0] * x.new_ones([x.shape[0]]), **extra_args))
        return x

    positive, negative = architecture.prompts()
    comfy.sample.sample_custom(
        with_cache(model, strategy, watch=reports.watch),
        architecture.noise(), 3.0, comfy.samplers.KSAMPLER(evaluate), torch.tensor([0.7, 0.0]) * _sigma_scale(model),
        positive, negative, architecture.content(), noise_mask=None, callback=None, disable_pbar=True, seed=0,
    )  # fmt: skip
    error = (predictions[-1] - predictions[0]).norm() / predictions[0].norm()
    return Replayed(error.item(), Counter(specimen.blocks), reports.all[0])


def _sigma_scale(model: Any) -> float:
    """What a sigma of 1 is to a flow model, to this model."""
    highest = float(model.get_model_object("model_sampling").sigma_max)
    return 1.0 if highest <= 1.5 else 3.0
