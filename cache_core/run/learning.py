"""What the first call of a model taught: put to the test, then made known, and what it computed is kept."""

from collections.abc import Callable

from ..model import BlockPlan, Hook, Lesson, Stage, rehearse
from ..strategy import Strategy
from .stack import keep_learned
from .state import CallState
from .visit import Visit

NO_CHAIN = "no chain of blocks was found: only the whole model's output can be cached"


def lesson_for(call: CallState) -> Lesson | None:
    """To watch this call, if a strategy needs the model's chains of blocks."""
    if not call.run.terms.need_blocks:
        return None
    call.evaluation.is_learning = True
    return Lesson(call.model.module, call.run.terms.methods, is_compiled=not call.model.compilation.is_none)


def learn(
    call: CallState, lesson: Lesson, perform: Callable[[list[Hook]], None], visit: Callable[[Strategy], Visit]
) -> None:  # fmt: skip
    """Learn the chains from a call that was watched.

    `perform(hooks)` makes it once more with these hooks; `visit(strategy)` is a strategy's along the stack.
    """
    run, model = call.run, call.model
    plan, why_not = lesson.plan(), None
    if plan.chains and run.terms.steps_in_at("model"):
        device = call.sigma.tensor.device
        largest = lambda values: run.terms.ranks.largest(values, device)  # noqa: E731
        stage = Stage(lesson, perform, largest, run.terms.on_blocks_left_out, run.terms.cancels)
        plan, why_not, is_certain = rehearse(plan, stage)
        if why_not and model.may_learn_again() and not is_certain:
            return
    plan = BlockPlan() if why_not else plan
    model.learn(plan)
    run.memories.forget_outside({name for chain in plan.chains for name in chain.names})
    run.report.blocks = str(plan)
    for note in plan.notes if plan.chains else (*plan.notes, NO_CHAIN):
        run.report.note(note)
    if why_not:
        run.report.note(f"the model's blocks could not be read ({why_not}), so they always run")
    learned = [lesson.streams_of(chain) for chain in plan.chains]
    for strategy in run.terms.strategies if learned else ():
        if "model" in strategy.levels:
            keep_learned(visit(strategy), plan, learned)
