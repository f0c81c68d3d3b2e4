"""The schedule of one sampling run, read off ComfyUI's model."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import ModelSamplingDiscrete

from ...strategy.step import Schedule


def schedule_of(model: ModelPatcher, sigmas: torch.Tensor) -> Schedule:
    """The sigmas of one sampling run, and how this model counts them."""
    sampling = model.get_model_object("model_sampling")
    timestep_of = None  # of a flow model: its sigma in thousandths
    if isinstance(sampling, ModelSamplingDiscrete):
        timestep_of = lambda sigma: float(sampling.timestep(torch.tensor(sigma)))  # noqa: E731
    return Schedule(sigmas.tolist(), sampling.percent_to_sigma, timestep_of)
