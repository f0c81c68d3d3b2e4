"""Whose forward pass a model call is: here the key of a branch is made.

What a branch keeps serves only the same entry of the prompt, context window, shape and model, with the same ControlNets
and LoRA hooks at work, so all of these belong into its key.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch

from ...model.compiled import uncompiled
from .exceptions import MODELS_THAT_SWAP_BRANCHES

CONTROLS = "refrain_controls"  # the transformer option that says which ControlNets are on, by entry of the prompt
BRANCHES = ("positive", "negative")  # what ComfyUI's guiders number 0 and 1


def contexts_of(base_model: Any, x: Any, control: Any, options: dict) -> list[Hashable]:
    """The keys of one model call, one for each branch joined along the batch axis.

    Other nodes' replaced blocks belong into them too. Where the rows can't be told apart they are one branch.
    """
    uuids, frames = options.get("uuids") or options.get("cond_or_uncond") or [None], _frames_in(options)
    rows, odd = divmod(x.shape[0], len(uuids))
    if odd:
        uuids, rows = [tuple(uuids)], x.shape[0]
    patched = frozenset(
        (kind, str(key)) for kind, patches in options.get("patches_replace", {}).items() for key in patches
    )
    model = (id(base_model.diffusion_model), _hooks_on(base_model))
    controls = options.get(CONTROLS, {})
    keys = [
        (uuid, frames, rows, tuple(x.shape[1:]), model, control is not None, controls.get(uuid), patched)
        for uuid in uuids
    ]
    swaps = type(uncompiled(base_model.diffusion_model)).__name__ in MODELS_THAT_SWAP_BRANCHES
    return [tuple(keys)] if swaps else keys


def labels_of(options: dict) -> list[str]:
    """What the report calls the branches of one model call."""
    numbers = options.get("cond_or_uncond", [])
    return [BRANCHES[number] if number < len(BRANCHES) else f"branch {number}" for number in numbers]


def context_of_guidance(model: Any, conds: list, x: Any, sigma: torch.Tensor, options: dict) -> Hashable:
    """The key of the negative prompt's prediction, which all entries of both prompts have a part in."""
    controls = tuple(options[CONTROLS].items())
    return (prompts_at(conds, sigma), _frames_in(options), tuple(x.shape), id(model.diffusion_model), controls)


def prompts_at(conds: list[list[dict] | None], sigma: torch.Tensor) -> tuple[tuple[Hashable, ...], ...]:
    """Which entries of the prompts count at this sigma, by branch. Reads it only if some have a range of their own."""
    conds = [branch or [] for branch in conds]  # None is a branch that is not wanted
    ranges = any("timestep_start" in cond or "timestep_end" in cond for branch in conds for cond in branch)
    now = float(sigma[0]) if ranges else 0.0
    return tuple(
        tuple(
            cond["uuid"] for cond in branch if cond.get("timestep_end", now) <= now <= cond.get("timestep_start", now)
        )
        for branch in conds
    )


def controls_at(conds: list[list[dict] | None], sigma: torch.Tensor) -> dict[Any, tuple[bool, ...]]:
    """Which of the ControlNets that work in a range of their own are on at this sigma, by entry of the prompt.

    Reads it only if there are some.
    """
    chains = {cond["uuid"]: list(_ranged_controls(cond)) for branch in conds if branch for cond in branch}
    now = float(sigma[0]) if any(chains.values()) else 0.0
    return {
        uuid: tuple(control.timestep_range[1] <= now <= control.timestep_range[0] for control in chain)
        for uuid, chain in chains.items()
        if chain
    }


def _ranged_controls(cond: dict) -> Iterator[Any]:
    control = cond.get("control")
    while control is not None:
        if control.timestep_range is not None and tuple(control.timestep_percent_range) != (0.0, 1.0):
            yield control
        control = control.previous_controlnet


def _frames_in(options: dict) -> tuple[int, ...] | None:
    """The frames of the context window that is sampled; None without one."""
    window = options.get("context_window")
    return None if window is None else tuple(window.index_list)


def _hooks_on(base_model: Any) -> tuple[tuple[int, float], ...]:
    """The LoRA hooks on the model's weights and how strong each is now: a keyframe makes another model of it."""
    hooks = getattr(getattr(base_model, "current_patcher", None), "current_hooks", None)
    return () if hooks is None else tuple((id(hook.hook_ref), float(hook.strength)) for hook in hooks.hooks)
