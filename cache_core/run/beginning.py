"""Which strategies work in a run, known when it begins; of those that do not, its report says why."""

from collections.abc import Sequence

from ..report.report import Report
from ..strategy import Schedule, Strategy


def begun(strategies: Sequence[Strategy], schedule: Schedule) -> tuple[tuple[Strategy, ...], Report]:
    """Those that are on, without those that rest, which then cost nothing; and a report."""
    on = tuple(dict.fromkeys(strategy for strategy in strategies if not strategy.is_off))
    resting = {strategy: why for strategy in on if (why := strategy.why_resting(schedule))}
    working = tuple(strategy for strategy in on if strategy not in resting)
    obstacles = () if schedule.is_open else filter(None, (strategy.obstacle(schedule) for strategy in working))
    report = Report(tuple(strategies), schedule.count, obstacles=(*resting.values(), *obstacles), resting=resting)
    for strategy, why in resting.items() if working else ():
        report.note(f"{strategy.title} skipped nothing: {why}")
    return working, report
