"""Where a sampling run is repaired: between what the model predicts, guidance and all, and the sampler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..strategy import Schedule, Strategy, is_same
from ..strategy.repairing import OFF
from .reading import SigmaReading
from .repair import Repair
from .solvers import Weights
from .state import RunState

UNKNOWN_SOLVER = "the sampler steps neither as euler nor as dpmpp_2m or res_multistep"
BESIDE = "another cache works beside this one"
NOT_FALLING = "the noise does not only fall in this run"
CANNOT = "what is sampled or kept in this run can not be corrected"
NO_MEMORY = "memory ran out, so gaps between computed steps are no longer repaired"

Denoised = Callable[[Tensor, Tensor, Tensor], Tensor]  # of a sigma, a model output and a latent, as the model has it


def allow_repair(run: RunState, mask: Tensor | None, denoised_of: Denoised, why_not: str = "") -> None:
    """Let this run be repaired, if its settings want that. The host takes what `end_evaluation` returns.

    `why_not`, in a few words: what the host knows that speaks against it.
    """
    on = run.terms.strategies
    if all(strategy.repair == OFF for strategy in on):
        return
    if why := why_not or _why_not(on, run.terms.schedule):
        run.report.unrepaired = why
        return
    run.repair, run.denoised_of, run.paths.whole_is_followed = Repair(mask), denoised_of, True


def repaired(run: RunState, predictions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the sampler should be given instead of these, at the end of an evaluation."""
    if run.repair is None:
        return predictions
    latent = run.asked_about()
    is_one = latent is not None and len(predictions) == 1 and predictions[0].shape == latent.shape
    if not is_one or not run.repair.fits(latent):
        run.leave_unrepaired(CANNOT)
        return predictions
    try:
        return (_repaired(run, run.repair, latent, predictions[0]),)
    except Exception as error:
        if not run.terms.go_on_after(error):
            raise
    run.report.note(NO_MEMORY)
    run.leave_unrepaired()
    return predictions


def _why_not(on: tuple[Strategy, ...], schedule: Schedule) -> str:
    if len(on) > 1:
        return BESIDE
    if schedule.is_open or schedule.is_rising:
        return NOT_FALLING
    return on[0].why_unrepaired(schedule)


def _repaired(run: RunState, repair: Repair, latent: Tensor, denoised: Tensor) -> Tensor:
    evaluation = run.evaluation
    reading = evaluation.reading
    if reading is None or not reading.is_read or run.paths.whole.unread:  # nothing is known without a wait
        repair.forget()
        repair.stepped = None
        return denoised
    sigma, following = reading.value, _following(run, reading)
    if following is None or not repair.know(partial(_was_step_of, run, repair, sigma)):
        run.leave_unrepaired(UNKNOWN_SOLVER)
        return denoised
    if evaluation.before is None or evaluation.before.contexts != evaluation.contexts:
        repair.forget()  # another model or prompt, or a branch that is new
    fix = repair.step(latent, denoised, sigma, following, not evaluation.is_reused)
    if fix is None:
        return denoised
    if fix.missed is not None and not _move_histories(run, sigma, fix.missed):
        run.leave_unrepaired(CANNOT)
        return denoised
    run.report.gaps_repaired, repair.gaps = run.report.gaps_repaired + repair.gaps, 0
    return fix.denoised


def _following(run: RunState, reading: SigmaReading) -> float | None:
    """The sigma to which the sampler steps from here; None where it is none of the schedule's steps."""
    schedule, step = run.terms.schedule, reading.step
    here, following = schedule.sigmas[step.index], schedule.sigmas[min(step.index + 1, schedule.count)]
    return following if is_same(here, reading.value) and following < reading.value else None


def _was_step_of(run: RunState, repair: Repair, sigma: float, weights: Weights) -> bool:
    """Whether the latent came here by these weights, as far as can be told."""
    if repair.stepped is None or run.paths.whole.before is None:
        return True  # there is no step to judge
    return is_same(repair.stepped.following, sigma) and run.paths.whole.is_step_of(weights)


def _move_histories(run: RunState, sigma: float, missed: Tensor) -> bool:
    """What forecasts of the model's output are made of: as if it had been evaluated at the moved latent.

    The prediction stands, and is `a` times the latent plus `b` times the output. Whether that was possible.
    """
    kept = [(key, memory.state) for key, memory in list(run.memories.items()) if key[2].level == "output"]
    known = [key[1].forecast_from(state) for key, state in kept if key[0] in run.evaluation.contexts]
    histories = [history for history in known if history]
    if not histories:
        return True
    one, zero, level = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([sigma])  # on the CPU: nothing is waited for
    try:
        a, b = (float(run.denoised_of(level, *given)) for given in ((zero, one), (one, zero)))
        moved = [history.newest_moved(missed, -a / b) for history in histories]
    except (ArithmeticError, AttributeError, TypeError, ValueError):  # this model goes another way
        return False
    if not all(moved):
        return False
    for history, features in zip(histories, moved):
        history.features[0] = features
    return True
