"""Runs of few steps: each goes so far in noise that a stored value stands in for it badly."""

from __future__ import annotations

from typing import Any

from .setting import counted, setting
from .step import Schedule

MOST_FEW = 8  # at 4 and 6 steps what goes by the schedule gave the demo 11 to 25 dB, 3 plain steps 32
OTHER_SPACING = 1.5  # how many times as many steps a scheduler may put into a part of the noise range as an even one
USUAL = 20  # steps of the runs in which thresholds were measured
CHOICES = COMPUTE_ALL, DRAFT = ("compute all", "draft")


def few_steps() -> Any:
    """The setting `few_steps` of strategies that go by the schedule."""
    return setting(
        COMPUTE_ALL,
        f"What to do in runs of up to {MOST_FEW} steps, as of Lightning and Turbo models. 'compute all': skip nothing; "
        "the picture is exactly that without this node. 'draft': skip as in longer runs, which is faster and visibly "
        "changes the picture. Usual: 'compute all'.",
        choices=CHOICES,
        is_optional=True,
    )


def are_few(schedule: Schedule) -> bool:
    """Whether this run has so few steps that reuse would show. Of an unknown number it is not known: no.

    A list of sigmas that ends before the picture is the first part of a longer run (KSampler Advanced, Wan 2.2's first
    expert). It counts with the steps that the whole would have, as far as the model's noise range tells.
    """
    count = schedule.expected_count
    if count is None or count > MOST_FEW:
        return False
    if schedule.is_open or schedule.sigmas[-1] == 0:
        return True
    return count <= MOST_FEW * OTHER_SPACING * schedule.share_of_range


def why_few(title: str, schedule: Schedule, is_chosen: bool) -> str:
    """That nothing is reused for this reason, and what to do, in words to follow "0 reused: ".

    `is_chosen`: users can set `few_steps` on the node.
    """
    steps = counted(schedule.expected_count or 0, "step")
    todo = f"set few_steps to 'draft' on Apply {title}" if is_chosen else f"use Apply {title} with a higher threshold"
    return (
        f"with only {steps} each one changes so much that skipping it would show, so all were computed. To skip some "
        f"all the same, {todo}"
    )
