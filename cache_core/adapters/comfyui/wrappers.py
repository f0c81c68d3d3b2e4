"""`with_cache`: a MODEL that samples through a CacheRun.

Four of ComfyUI's wrappers, and nothing else: OUTER_SAMPLE opens a run and frees it, PREDICT_NOISE begins an evaluation,
CALC_COND_BATCH leaves out the negative prompt, APPLY_MODEL sends one forward pass through the run. The run travels in
the transformer options of one sampling run, which ComfyUI copies for it and drops after it, so nothing is left on the
model, whatever happens.
"""

from __future__ import annotations

import logging
import reprlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from comfy.model_sampling import ModelSamplingDiscrete
from comfy.patcher_extension import WrappersMP

from ...model.compiled import uncompiled
from ...report.report import Report
from ...run.run import CacheRun
from ...strategy.step import Schedule
from ...strategy.strategy import Strategy
from .exceptions import METHODS, MIXING, OTHER_CACHES, SWAPPING, refuse_other_caches, why_computed
from .threads import POOL, Threads
from .weights import FETCHED_ALL_THE_SAME, are_fetched_ahead, fetch_no_more_blocks

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger(__name__)

KEY = "refrain"
ATTENTION = "optimized_attention_override"  # the transformer option through which attention operations are sent
WITHIN = {"block", "module"}  # levels at which blocks are left out one by one
CONTROLS = "refrain_controls"  # the transformer option that says which ControlNets are on, by entry of the prompt
BRANCHES = ("positive", "negative")  # what ComfyUI's guiders number 0 and 1
NO_NEGATIVE = "the negative prompt is not run at all (cfg 1, or a distilled model), so there is none to skip"
CONTROLNET = "the ControlNet still runs at every step; only the model's own blocks are saved"
NO_PAIR = "the negative prompt always runs: this guider has {} branches, and it is estimated only beside one positive"
CHANGING_PROMPTS = "the negative prompt always runs: LoRA hooks or default prompts may change it from step to step"
MIXED_PROMPTS = "the negative prompt always runs: another node mixes it into the positive one's attention (NAG)"
OTHER_CACHE = "{} is on this model too; the calls that it leaves out count as computed here"


class Watcher(Protocol):
    """Told of one sampling run as it happens. The sampler waits for what these do: nothing in them may wait."""

    def called(self) -> None:
        """One more model call is in the report."""

    def ended(self, latent: Any) -> None:
        """The run is over; `latent` is its result as the sampler returns it, None if it was cancelled or failed."""


def with_cache(
    model: ModelPatcher,
    strategy: Strategy,
    on_report: Callable[[Report, Any], None] | None = None,
    watch: Callable[[Report], Watcher] | None = None,
    owner: str = "",
) -> ModelPatcher:
    """A clone of the model that samples with this strategy, beside those it has on other levels.

    Of two strategies that share a level the later replaces the earlier. `on_report(report, latent)` is called after
    each sampling run that ended by itself, with the run's result as the sampler returns it. `watch(report)` is called
    when a run begins, with a report that fills up; what it returns is told of every model call and of the end.
    `owner` is what the caller knows the strategy by, for the report. Raises ValueError for what is no MODEL, and
    where another node caches the same model calls.
    """
    if not hasattr(model, "add_wrapper_with_key"):
        told = f"{strategy.title}: model is {reprlib.repr(model)}, which is no MODEL"
        raise ValueError(f"{told}. Connect the model output of a loader, or of a node that changes its model.")
    refuse_other_caches([strategy], model.model_options.get("transformer_options", {}))
    before = model.get_attachment(KEY)
    parts = before.parts if before else ()
    replaced = [part for part in parts if set(part[0].levels) & set(strategy.levels)]
    for other, _ in replaced:
        logger.info("Refrain: %s replaces %s, which works at the same places.", strategy.title, other.title)
    parts = (*(part for part in parts if part not in replaced), (strategy, owner))
    cached = model.clone()
    wrappers = _Wrappers(parts, on_report, watch)
    cached.set_attachments(KEY, wrappers)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, wrappers.outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.APPLY_MODEL, apply_model),
    ):
        cached.remove_wrappers_with_key(kind, KEY)
        cached.add_wrapper_with_key(kind, KEY, wrapper)
    return cached


def strategies_of(model: ModelPatcher) -> tuple[Strategy, ...]:
    """The strategies that a MODEL samples with."""
    wrappers = model.get_attachment(KEY)
    return wrappers.strategies if wrappers else ()


class _Wrappers:
    """What a cached MODEL carries: its strategies, and the wrapper that opens a run with them."""

    def __init__(
        self,
        parts: Sequence[tuple[Strategy, str]],  # each with its owner
        on_report: Callable[[Report, Any], None] | None,
        watch: Callable[[Report], Watcher] | None,
    ) -> None:
        self.parts, self.on_report, self.watch = parts, on_report, watch
        self.strategies = tuple(strategy for strategy, _ in parts)

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one sampling run: guider.outer_sample(noise, latent_image, sampler, sigmas, ...)."""
        guider = executor.class_obj
        options = guider.model_options.setdefault("transformer_options", {})  # this run's own copy
        refuse_other_caches(self.strategies, options)  # a node may have been added since
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        mask = kwargs["denoise_mask"] if "denoise_mask" in kwargs else args[4] if len(args) > 4 else None
        schedule = schedule_of(guider.model_patcher, sigmas)
        run = CacheRun(self.strategies, schedule, METHODS, fetch_no_more_blocks, denoise_mask=mask)
        options[KEY] = run
        _put_innermost(options)
        for option in OTHER_CACHES.keys() & options:
            run.report.note(OTHER_CACHE.format(OTHER_CACHES[option]))
        try:
            with self._watched(run.report) as result:
                result.append(executor(*args, **kwargs))
                if are_fetched_ahead() and any(
                    set(strategy.levels) & WITHIN for strategy in run.state.terms.strategies
                ):
                    run.report.note(FETCHED_ALL_THE_SAME)
        finally:
            options.pop(KEY, None)
            run.free()
        (latent,) = result
        logger.info(run.report.line())
        if self.on_report is not None:
            self.on_report(run.report, latent)
        return latent

    @contextmanager
    def _watched(self, report: Report) -> Iterator[list[Any]]:
        """From the begin of a run to its end, however it ends. What the sampler returns belongs into the list."""
        report.owners = tuple(owner for _, owner in self.parts)
        watcher = None if self.watch is None else self.watch(report)
        report.on_call = None if watcher is None else watcher.called
        began, result = time.perf_counter(), []
        try:
            yield result
            report.seconds = time.perf_counter() - began
            report.close()
        except BaseException:
            report.seconds = time.perf_counter() - began
            report.stop()
            raise
        finally:
            if watcher is not None:
                watcher.ended(result[0] if report.state == "finished" else None)


def _put_innermost(options: dict) -> None:
    """Let our wrapper around a forward pass run last, whatever order the nodes are in.

    TorchCompileModel swaps compiled modules in by such a wrapper: ours then finds them, instead of hooking what they
    were compiled from.
    """
    wrappers = options.get("wrappers", {})
    around = dict(wrappers.get(WrappersMP.APPLY_MODEL, {}))
    if KEY in around:
        around[KEY] = around.pop(KEY)
        options["wrappers"] = wrappers | {WrappersMP.APPLY_MODEL: around}


def schedule_of(model: ModelPatcher, sigmas: torch.Tensor) -> Schedule:
    """The sigmas of one sampling run, and how this model counts them."""
    sampling = model.get_model_object("model_sampling")
    timestep_of = None  # of a flow model: its sigma in thousandths
    if isinstance(sampling, ModelSamplingDiscrete):
        timestep_of = lambda sigma: float(sampling.timestep(torch.tensor(sigma)))  # noqa: E731
    return Schedule(sigmas.tolist(), sampling.percent_to_sigma, timestep_of)


def predict_noise(executor: Any, x: Any, timestep: Any, model_options: dict = {}, seed: Any = None) -> Any:
    """Around one evaluation of the noise prediction: guider.predict_noise(x, timestep, model_options, seed).

    It returns the denoised latent.
    """
    run = model_options.get("transformer_options", {}).get(KEY)
    if run is None:
        return executor(x, timestep, model_options, seed)
    run.begin_evaluation(latent=x)
    denoised = executor(x, timestep, model_options, seed)
    run.end_evaluation(x, denoised)
    return denoised


def apply_model(
    executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
    transformer_options: dict = {}, **conds: Any,
) -> Any:  # fmt: skip
    """Around one forward pass: BaseModel._apply_model(x, sigma, ...). It returns the branches' denoised latents."""

    def forward() -> Any:
        return executor(x, t, c_concat, c_crossattn, _of_its_own(control), options, **conds)

    run, options = transformer_options.get(KEY), transformer_options
    if run is None:
        return forward()
    if why := why_computed(options):
        run.report.note(why)
        return forward()
    if control is not None:
        run.report.note(CONTROLNET)
    if run.steps_in_at("attention"):
        options = options | {ATTENTION: partial(attention, run, options.get(ATTENTION))}
    model = executor.class_obj.diffusion_model
    contexts = contexts_of(executor.class_obj, x, control, transformer_options)
    if type(uncompiled(model)).__name__ in SWAPPING:
        contexts = [tuple(contexts)]
    numbers = transformer_options.get("cond_or_uncond", [])
    labels = [BRANCHES[number] if number < len(BRANCHES) else f"branch {number}" for number in numbers]
    inputs = (x, c_concat, c_crossattn, control, conds)
    return run.call_model(model, forward, t, contexts, labels, inputs=inputs)


def _of_its_own(control: Any) -> Any:
    """A ControlNet's signal that the model may take apart: HunyuanDiT empties its lists, and may be run again."""
    if not isinstance(control, dict):
        return control
    return {part: list(members) if isinstance(members, list) else members for part, members in control.items()}


def attention(
    run: CacheRun, other: Callable[..., Any] | None, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Around one attention operation: function(q, k, v, heads, ...), or another node's override of it."""
    return run.call_attention(function if other is None else partial(other, function), *args, **kwargs)


def calc_cond_batch(
    executor: Any, model: Any, conds: list, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict
) -> Any:
    """Around one evaluation of all branches: calc_cond_batch(model, [positive, negative], x, sigma, model_options).

    It returns denoised latents. Strategies are handed what was taken away, as a share of sigma: the noise prediction.
    """
    options = model_options.get("transformer_options", {})
    run = options.get(KEY)

    def compute(branches: list) -> Any:
        if run is None or POOL not in model_options:
            return executor(model, branches, x_in, timestep, model_options)
        entries = [entry for prompts in prompts_at(branches, timestep) for entry in prompts]
        with run.in_threads(entries):
            return executor(model, branches, x_in, timestep, model_options | {POOL: Threads(run, model_options)})

    if run is None:
        return compute(conds)
    options[CONTROLS] = controls = controls_at(conds, timestep)
    if not run.steps_in_at("guidance"):
        return compute(conds)
    if len(conds) != len(BRANCHES):
        run.report.note(NO_PAIR.format(len(conds)))
        return compute(conds)
    if not all(conds):
        run.report.note(NO_NEGATIVE)
        return compute(conds)
    if any("hooks" in cond or "default" in cond for branch in conds for cond in branch):
        run.report.note(CHANGING_PROMPTS)
        return compute(conds)
    if MIXING & options.get("patches", {}).keys():
        run.report.note(MIXED_PROMPTS)
        return compute(conds)
    sigma = timestep.reshape(-1, *[1] * (x_in.ndim - 1))  # (rows, 1, ...)
    denoised: list[Any] = [None, None]  # by branch, as far as computed

    def predict(*wanted: bool) -> list[torch.Tensor | None]:
        computed = compute([branch if is_wanted else None for branch, is_wanted in zip(conds, wanted)])
        for branch, is_wanted in enumerate(wanted):
            if is_wanted:
                denoised[branch] = computed[branch]
        return [(x_in - denoised[branch]) / sigma if is_wanted else None for branch, is_wanted in enumerate(wanted)]

    diffusion_model = model.diffusion_model
    prompts = prompts_at(conds, timestep)
    context = (prompts, _frames_in(options), tuple(x_in.shape), id(diffusion_model), tuple(controls.items()))
    _, unconditional = run.call_guidance(diffusion_model, predict, timestep, context, BRANCHES[1])
    if denoised[1] is None:
        denoised[1] = (x_in - sigma * unconditional).to(denoised[0].dtype)
    return denoised


def prompts_at(conds: list[list[dict] | None], sigma: torch.Tensor) -> Hashable:
    """Which entries of the prompts count at this sigma. Reads it only if some have a range of their own."""
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


def contexts_of(base_model: Any, x: Any, control: Any, options: dict) -> list[Hashable]:
    """Whose forward pass a model call is, one key for each branch joined along the batch axis.

    A branch's features serve only the same entry of the prompt, window, shape and model, with the same ControlNets and
    LoRA hooks at work and with other nodes' replaced blocks as before.
    """
    uuids, frames = options.get("uuids") or [None], _frames_in(options)
    rows, odd = divmod(x.shape[0], len(uuids))
    if odd:
        uuids, rows = [tuple(uuids)], x.shape[0]
    patched = frozenset(
        (kind, str(key)) for kind, patches in options.get("patches_replace", {}).items() for key in patches
    )
    model = (id(base_model.diffusion_model), _hooks_on(base_model))
    controls = options.get(CONTROLS, {})
    return [
        (uuid, frames, rows, tuple(x.shape[1:]), model, control is not None, controls.get(uuid), patched)
        for uuid in uuids
    ]


def _hooks_on(base_model: Any) -> tuple[tuple[int, float], ...]:
    """The LoRA hooks on the model's weights and how strong each is now: a keyframe makes another model of it."""
    hooks = getattr(getattr(base_model, "current_patcher", None), "current_hooks", None)
    return () if hooks is None else tuple((id(hook.hook_ref), float(hook.strength)) for hook in hooks.hooks)
