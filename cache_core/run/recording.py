"""What a model call did, written down for the report."""

from collections.abc import Sequence

from ..report.record import CallRecord
from .evaluation import NO_LEADER
from .state import CallState
from .telling import telling
from .visit import Visit


def record(call: CallState, visits: Sequence[Visit], labels: tuple[str, ...]) -> None:
    """Tell the report what a call did, and how much is held by now."""
    run, evaluation = call.run, call.evaluation
    evaluation.reading = call.sigma
    evaluation.is_reused |= any(visit.was_answered for visit in visits)
    if evaluation.missed_leader:
        run.report.note(NO_LEADER)
    if labels:
        with telling(run.report, run.terms.cancels):
            run.report.add(_record_of(call, visits, labels))
    if any(visit.has_kept for visit in visits):
        with telling(run.report, run.terms.cancels):
            memories, is_split = run.memories, bool(run.budget.away)
            latents = 0 if run.repair is None else run.repair.bytes_held
            run.report.held(memories.bytes_held + latents, memories.bytes_reserved() + latents)
            if is_split:
                run.report.held_away(memories.bytes_away, memories.bytes_reserved(is_away=True))


def _record_of(call: CallState, visits: Sequence[Visit], labels: tuple[str, ...]) -> CallRecord:
    total = sum(visit.units for visit in visits)
    computed = sum(min(visit.units_computed, visit.units) for visit in visits)
    answered = [visit for visit in visits if visit.was_answered]
    first = next((branch for visit in answered or visits for branch in visit.branches), None)  # it speaks for all
    is_learning = call.evaluation.is_learning
    return CallRecord(
        reading=call.sigma,
        branches=labels,
        action="computed" if not answered else "forecast" if first.order else "reused",
        reason="learning the model's blocks"
        if is_learning
        else first.reason
        if first
        else call.run.why_computed or "nothing is cached in it",
        measure=first.measure if first else None,
        computed_share=computed / total if total else 1.0,
        watch=call.watch,
        evaluation=call.evaluation.number,
        threshold=first.threshold if first else None,
        strategy=first.strategy.title if first else "",
        attention_only=bool(answered) and all(visit.site.level == "attention" for visit in answered),
    )
