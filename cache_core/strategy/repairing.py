"""Whether gaps between computed steps are repaired in hindsight (`run/repair.py`): the setting, and how far apart."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any

from .setting import setting
from .spacing import places_of
from .step import Schedule

OFF, ON = CHOICES = ("off", "on")
# As shares of the run, in places, by what is forecast. What is kept of the output is moved too: up to .161 the demo
# gained at every flow shift, at .2 not. What is kept along the blocks can't be: at .15 it gained nothing at 3, and lost
# at 6.
LONGEST_GAPS = {"output": 0.17, "model": 0.14}
TOO_LONG = "computed steps are too far apart"


def repair() -> Any:
    """The setting `repair`."""
    return setting(
        ON,
        "'on': when a step is computed, correct what the skipped steps before it moved wrongly, which is known by "
        "then; usually closer to the uncached picture, at no model call and for a few latents. Where the sampler steps "
        "neither as euler nor as dpmpp_2m or res_multistep, nothing is corrected. 'off': never correct. Usual: 'on' "
        "with these samplers, else 'off'.",
        choices=CHOICES,
        is_optional=True,
    )


def why_too_long(schedule: Schedule, computed: Collection[int], level: str = "model") -> str:
    """That skipped steps lie between computed ones that are too far apart for a straight line; "" if they are not.

    Skipped steps after the last computed one do not count: nothing repairs them.
    """
    places = places_of(schedule.times)
    gaps = [places[b] - places[a] for a, b in pairwise(sorted(computed)) if b > a + 1]
    return TOO_LONG if max(gaps, default=0.0) > LONGEST_GAPS[level] * schedule.count else ""
