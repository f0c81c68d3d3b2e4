"""What the first call of a model taught: put to the test, then made known, and what it computed is kept."""

from collections.abc import Callable
from dataclasses import replace

from ..model import BlockPlan, Hook, Lesson, Stage, parts_of, rehearse
from ..strategy import Strategy
from .cost import note_work
from .stack import keep_learned
from .state import CallState
from .visit import Visit

NOT_ALIKE = "ranks found other chains of blocks than each other, so their blocks always run"
NO_FRAMES = "guard finds no frames in this model's tokens, so means alone decide"
PARTS_IN_RANKS = (
    "guard goes by the main stream's mean alone: ranks that share a picture add up their tokens, whichever frames they "
    "are of"
)
NO_CHAIN = "no chain of blocks was found: only the whole model's output can be cached"


def lesson_for(call: CallState) -> Lesson | None:
    """To watch this call, if a strategy needs the model's chains of blocks."""
    if not call.run.terms.need_blocks:
        return None
    call.evaluation.is_learning = True
    along = [strategy for strategy in call.run.terms.strategies if "model" in strategy.levels]
    starts = {"after first" if strategy.tests_first_block else "entered" for strategy in along}
    starts |= {"entered" for strategy in along if strategy.tests_parts}
    return Lesson(call.model.module, call.run.terms.methods, not call.model.compilation.is_none, starts)


def learn(
    call: CallState, lesson: Lesson, perform: Callable[[list[Hook]], None], visit: Callable[[Strategy], Visit]
) -> None:  # fmt: skip
    """Learn the chains from a call that was watched.

    `perform(hooks)` makes it once more with these hooks; `visit(strategy)` is a strategy's along the stack.
    """
    run, model = call.run, call.model
    plan, why_not = lesson.plan(), None
    ranks, device = run.terms.ranks, call.sigma.tensor.device
    if not ranks.are_alike([chain.names for chain in plan.chains], device):
        plan = BlockPlan(notes=(NOT_ALIKE,))
    is_first = call.evaluation.before is None
    if not plan.chains and any(ranks.largest([lesson.ran_in_turns], device)) and model.may_learn_again(is_first):
        run.memories.forget(call.contexts)  # what blocks gave for the first turn is not what they will be asked for
        return
    if plan.chains and run.terms.steps_in_at("model"):
        largest = lambda values: ranks.largest(values, device)  # noqa: E731
        stage = Stage(lesson, perform, largest, run.terms.on_blocks_left_out, run.terms.cancels)
        plan, why_not, is_certain = rehearse(plan, stage)
        if why_not and model.may_learn_again(is_first) and not is_certain:
            return
        if not why_not and any(strategy.tests_parts for strategy in run.terms.strategies):
            plan = _with_parts(plan, stage, call)
    plan = BlockPlan() if why_not else plan
    model.learn(plan)
    if any(strategy.target_speedup for strategy in run.terms.strategies):
        note_work(call)
    run.memories.forget_outside({name for chain in plan.chains for name in chain.names})
    run.report.blocks = str(plan)
    for note in plan.notes if plan.chains else (*plan.notes, NO_CHAIN):
        run.report.note(note)
    if why_not:
        run.report.note(f"the model's blocks could not be read ({why_not}), so they always run")
    if not plan.chains or not run.terms.steps_in_at("model"):
        return
    learned = [lesson.streams_of(chain) for chain in plan.chains]
    for strategy in run.terms.strategies:
        if "model" in strategy.levels:
            keep_learned(visit(strategy), plan, learned)


def _with_parts(plan: BlockPlan, stage: Stage, call: CallState) -> BlockPlan:
    """The plan, and which tokens of its streams are the sound's and each frame's."""
    if call.run.terms.ranks.group is not None:
        call.run.report.note(PARTS_IN_RANKS)
        return plan
    parts = parts_of(plan, stage)
    if not any(part.frames > 1 for part in parts):
        call.run.report.note(NO_FRAMES)
    return replace(plan, parts=parts)
