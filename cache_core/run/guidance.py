"""How a strategy stands in for the prediction without the prompt, and what is done where leaving it out goes wrong.

Another node's cache may keep one output for both prompts. A call with fewer of them then fails, or is answered with
what belongs to the other prompt; and so may the next call with both, where it kept an output in between.
"""

from collections.abc import Callable

from torch import Tensor

from ..strategy import CONDITIONAL, Request, copied
from .state import RunState
from .visit import Visit

Predict = Callable[[bool, bool], tuple[Tensor | None, Tensor | None]]  # with the prompt, without; None if not wanted

GIVEN, WITHOUT, BOTH = (True, False), (False, True), (True, True)
FAILED = (
    "the negative prompt runs in every step from here on: leaving it out made a call fail ({}: {:.100}), as beside "
    "another node's cache that keeps one output for both prompts"
)


def at_guidance(visit: Visit, predict: Predict, latent: Tensor | None) -> tuple[Tensor, Tensor]:
    """The noise predictions with and without the prompt: the model's own, or the strategy's for the one without.

    `predict(with, without)` computes those that are wanted, of this latent, or both where that went wrong.
    """
    decision, call = visit.decide(()), visit.call
    if _may_leave_out(visit, latent):
        (call.evaluation.unconditional,) = call.labels
    if decision is CONDITIONAL:
        call.run.memories.forget_unusable(call.sigma.step.index)
        others_seen = call.run.others_seen
        conditional, unconditional = predict(*GIVEN)
        if unconditional is not None:
            return conditional, unconditional
        if call.run.others_seen > others_seen:  # seen in this very call: what is kept is of another picture
            visit.units_computed += 1
            call.run.memories.forget_at("guidance")
            again, unconditional = predict(*WITHOUT)
            return conditional if again is None else again, unconditional
        with call.watch:
            decision = visit.decide_with(copied([conditional]))
        if not isinstance(decision, Request):
            return conditional, decision[0]
        again, unconditional = predict(*WITHOUT)
        conditional = conditional if again is None else again
    else:
        conditional, unconditional = predict(*BOTH)
    visit.units_computed += 1
    if visit.wants([(conditional, unconditional)]):
        visit.keep([copied([conditional, unconditional])])
    return conditional, unconditional


def _may_leave_out(visit: Visit, latent: Tensor | None) -> bool:
    """Whether the strategy may stand in after this evaluation, as far as is known: what it needs for that is kept."""
    (memory,) = visit.memories
    if memory.layout is None:  # nothing was predicted yet
        return not visit.is_excluded and (latent is None or visit.strategy.will_hold(visit.site, (latent,)) > 0)
    return memory.reserved > 0


def mended(run: RunState, predict: Predict) -> Predict:
    """`predict`; where it goes wrong because a prompt is left out, or was before, it is asked once more, another way.

    With both prompts, or one by one where the call with both fails. From then on no prompt is left out.
    """

    def predicted(*wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        evaluation, known, failed = run.evaluation, set(run.evaluation.contexts), ""
        ask, run.has_left_out = evaluation.noting(predict), run.has_left_out or wanted != BOTH
        try:
            predictions = ask(*wanted)
        except Exception as error:
            if not (run.has_left_out and run.terms.may_ask_again_after(error)):
                raise
            failed = FAILED.format(type(error).__name__, str(error))
        else:
            if not run.was_called:
                run.someone_else_answered()
            if not evaluation.is_answered:
                run.computed_for = wanted
        if failed or wanted not in (BOTH, run.computed_for):
            run.begin_again(known, failed)  # nothing refers to what failed by now
            predictions = (ask(*GIVEN)[0], ask(*WITHOUT)[1]) if wanted == BOTH else ask(*BOTH)
        if run.why_all_prompts:
            run.report.note(run.why_all_prompts)
        return predictions

    return predicted
