"""Wrappers inside a sampling run: around one evaluation, around its branches, and around one forward pass.

What does not fit them, in a ComfyUI that is newer than they, is computed as without them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...run.run import CacheRun
from .contexts import contexts_of, labels_of
from .exceptions import of_its_own, why_computed
from .guidance import denoised_of_branches
from .seams import MOVED, fitting, otherwise, run_in

ATTENTION = "optimized_attention_override"  # the transformer option through which attention operations are sent
CONTROLNET = "the ControlNet still runs at every step; only the model's own blocks are saved"
ALL_COMPUTED = "such model calls are computed"


@fitting
def predict_noise(executor: Any, x: Any, timestep: Any, model_options: dict = {}, *more: Any, **named: Any) -> Any:
    """Around one evaluation of the noise prediction: guider.predict_noise(x, timestep, model_options, seed).

    It returns the denoised latent.
    """
    run = run_in(model_options)
    if run is None:
        return executor(x, timestep, model_options, *more, **named)
    run.begin_evaluation(latent=x)
    return run.end_evaluation(executor(x, timestep, model_options, *more, **named))


@fitting
def apply_model(
    executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
    transformer_options: dict = {}, *more: Any, **conds: Any,
) -> Any:  # fmt: skip
    """Around one forward pass: BaseModel._apply_model(x, sigma, ...). It returns the branches' denoised latents."""

    def forward() -> Any:
        return executor(x, t, c_concat, c_crossattn, of_its_own(control), options, *more, **conds)

    run, options = run_in(transformer_options), transformer_options
    if run is None:
        return forward()
    if why := why_computed(options):
        run.pass_over(why)
        return forward()
    try:
        model = executor.class_obj.diffusion_model
        contexts, labels = contexts_of(executor.class_obj, x, control, options), labels_of(options)
    except MOVED as error:
        model = None
        run.pass_over(otherwise(ALL_COMPUTED, error))
    if model is None:
        return forward()
    if control is not None:
        run.report.note(CONTROLNET)
    if run.state.terms.steps_in_at("attention"):
        options = options | {ATTENTION: partial(attention, run, options.get(ATTENTION))}
    inputs = (x, c_concat, c_crossattn, control, conds)
    latent = None if "context_window" in transformer_options else x  # which frames a window has is in the key
    return run.call_model(model, forward, t, contexts, labels, inputs, latent)


def attention(
    run: CacheRun, other: Callable[..., Any] | None, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Around one attention operation: function(q, k, v, heads, ...), or another node's override of it."""
    run.state.attends = True
    return run.call_attention(function if other is None else partial(other, function), *args, **kwargs)


@fitting
def calc_cond_batch(
    executor: Any, model: Any, conds: list, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict, *more: Any,
    **named: Any,
) -> Any:  # fmt: skip
    """Around one evaluation of all branches: calc_cond_batch(model, [positive, negative], x, sigma, model_options).

    It returns denoised latents.
    """

    def compute(*given: Any) -> Any:
        return executor(*given, *more, **named)

    run = run_in(model_options)
    if run is None:
        return compute(model, conds, x_in, timestep, model_options)
    if run.state.is_evaluating:
        return denoised_of_branches(run, compute, model, conds, x_in, timestep, model_options)
    run.begin_evaluation_of(x_in)  # the guider goes past PREDICT_NOISE
    denoised = denoised_of_branches(run, compute, model, conds, x_in, timestep, model_options)
    run.end_evaluation(*(branch for branch in denoised if branch is not None))
    return denoised
