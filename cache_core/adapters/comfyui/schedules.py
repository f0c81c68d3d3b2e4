"""The sigmas of a sampling run, as the model at hand counts them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ...strategy.step import Schedule, schedule_of
from .seams import CONST, ModelPatcher, ModelSamplingDiscrete

TINY = 1e-12  # a sigma, for its logarithm
UNORDERED = "the sigmas of this run both fall and rise, so steps are counted as they come and spaced evenly"


def schedule_for(model: ModelPatcher, sigmas: torch.Tensor) -> Schedule:
    """The sigmas of one sampling run, and how this model counts them. Reads the device, once a run."""
    sampling, timestep_of = model.get_model_object("model_sampling"), None
    if isinstance(sampling, ModelSamplingDiscrete):  # counts in a table; other models by the noise's share
        table = np.log(sampling.sigmas.double().cpu().numpy())
        nearest = lambda sigma: np.abs(table - np.log(max(sigma, TINY))).argmin()  # noqa: E731
        timestep_of = lambda sigma: float(nearest(sigma)) * 1000 / len(table)  # noqa: E731
    return schedule_of(sigmas.tolist(), sampling.percent_to_sigma, timestep_of, isinstance(sampling, CONST))


def denoised_by(model: ModelPatcher) -> Callable[..., torch.Tensor] | None:
    """Makes the clean latent of a sigma, a model output and a latent, as this model does; None where it has no way."""
    if not hasattr(model.get_model_object("model_sampling"), "calculate_denoised"):
        return None
    return lambda *given: model.get_model_object("model_sampling").calculate_denoised(*given)
