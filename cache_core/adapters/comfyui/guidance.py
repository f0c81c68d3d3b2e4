"""One evaluation of all branches, in which the negative prompt may be left out and its prediction be estimated.

ComfyUI's guidance works on denoised latents. Strategies are handed what was taken away, as a share of sigma: the noise
prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...run.run import CacheRun
from .contexts import BRANCHES, CONTROLS, context_of_guidance, controls_at, prompts_at
from .exceptions import PATCHES_THAT_MIX_PROMPTS
from .seams import MOVED, otherwise
from .threads import POOL, Threads, fits

NO_NEGATIVE = "where cfg is 1, or with a distilled model, the negative prompt is not run, so there is none to skip"
ONE_BY_ONE = (
    "the negative prompt is never estimated: that takes one request for both prompts, and this guider asks for one at "
    "a time"
)
NO_PAIR = (
    "the negative prompt always runs: to estimate it takes one positive and one negative branch, and this guider has "
    "{} branches"
)
CHANGING_PROMPTS = "the negative prompt always runs: LoRA hooks or default prompts may change it from step to step"
MIXED_PROMPTS = "the negative prompt always runs: another node mixes it into the positive one's attention (NAG)"
ALWAYS_RUNS = "the negative prompt always runs, and ControlNets that end in mid-run are noticed later"

Compute = Callable[[list], Any]  # the denoised latents of branches; a branch that is None is left out


def denoised_of_branches(
    run: CacheRun, executor: Any, model: Any, conds: list, x: torch.Tensor, sigma: torch.Tensor, model_options: dict
) -> Any:
    """The denoised latents of all branches, those of the negative prompt computed or estimated."""
    options = model_options["transformer_options"]
    compute = partial(_compute, run, executor, model, x, sigma, model_options)
    run.asked_together |= len(conds) > 1
    is_one = len(conds) == 1  # of this kind of guider, or a guidance's extra one
    controls = _known(run, controls_at, conds, sigma)
    options[CONTROLS] = controls or {}
    if is_one or not run.state.terms.steps_in_at("guidance"):
        return compute(conds)
    if why := _why_not_estimated(conds, options):
        run.report.note(why)
        return compute(conds)
    context = None if controls is None else _known(run, context_of_guidance, model, conds, x, sigma, options)
    if context is None:
        return compute(conds)
    return run.again(partial(_estimated, run, compute, model.diffusion_model, conds, x, sigma, context))


def _known(run: CacheRun, ask: Callable[..., Any], *given: Any) -> Any:
    """What is asked of the prompts' entries; None, which the report tells, where they have no such parts."""
    try:
        return ask(*given)
    except MOVED as error:
        run.report.note(otherwise(ALWAYS_RUNS, error))
        return None


def _why_not_estimated(conds: list, options: dict) -> str | None:
    """Why the negative prompt can't be estimated from the positive one, or None."""
    if len(conds) != len(BRANCHES):
        return NO_PAIR.format(len(conds))
    if not all(conds):
        return NO_NEGATIVE
    if any("hooks" in cond or "default" in cond for branch in conds for cond in branch):
        return CHANGING_PROMPTS
    if PATCHES_THAT_MIX_PROMPTS & options.get("patches", {}).keys():
        return MIXED_PROMPTS
    return None


def _compute(
    run: CacheRun, executor: Any, model: Any, x: torch.Tensor, sigma: torch.Tensor, model_options: dict, conds: list
) -> Any:
    """Call the model for these branches: in threads, where ComfyUI has several devices."""
    if not fits(model_options):
        return executor(model, conds, x, sigma, model_options)
    entries = [entry for prompts in prompts_at(conds, sigma) for entry in prompts]
    threads = Threads(run, model_options)
    with run.state.evaluation.in_threads(entries):
        try:
            return executor(model, conds, x, sigma, model_options | {POOL: threads})
        except Exception:
            threads.finish()
            raise


def _estimated(
    run: CacheRun, compute: Compute, network: Any, conds: list, x: torch.Tensor, timestep: torch.Tensor, context: Any
) -> list[Any]:
    """Both branches' denoised latents: of the negative prompt what the strategy says, computed or not."""
    sigma = timestep.reshape(-1, *[1] * (x.ndim - 1))  # (rows, 1, ...)
    denoised: list[Any] = [None, None]  # by branch, as far as computed

    def predict(*wanted: bool) -> list[torch.Tensor | None]:
        computed = compute([branch if is_wanted else None for branch, is_wanted in zip(conds, wanted)])
        for branch, is_wanted in enumerate(wanted):
            if is_wanted:
                denoised[branch] = computed[branch]
                if denoised[branch].shape != x.shape and not all(wanted):
                    raise RuntimeError(f"it gave {tuple(denoised[branch].shape)} for {tuple(x.shape)}")
        return [(x - denoised[branch]) / sigma if is_wanted else None for branch, is_wanted in enumerate(wanted)]

    _, unconditional = run.call_guidance(network, predict, timestep, context, BRANCHES[1], x)
    if denoised[1] is None:
        denoised[1] = (x - sigma * unconditional).to(denoised[0].dtype)
    return denoised
