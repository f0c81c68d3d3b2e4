"""Whether gaps between computed steps are repaired in hindsight (`run/repair.py`): the setting, and when not."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .setting import setting

OFF, ON = CHOICES = ("off", "on")
DEFAULT = OFF  # the one line to change
FEWEST = 10  # computed steps of a run: with as many, the demo gained by repair on 32 of 34 plans; with 8, on 17 of 37
TOO_LONG = "computed steps are too far apart"


def repair() -> Any:
    """The setting `repair`."""
    return setting(
        DEFAULT,
        "'on': when a step is computed, correct what the skipped steps before it moved wrongly, which is known by "
        "then; usually closer to the uncached picture, at no model call and for two latents. Where the sampler does "
        "not step as euler does, nothing is corrected. 'off': never correct. Usual: 'on' with the sampler euler, else "
        "'off'.",
        choices=CHOICES,
        is_optional=True,
    )


def why_too_long(computed: Collection[int]) -> str:
    """That a plan's computed steps are too far apart for straight lines between them; "" if they are not.

    It is their number that tells: single gaps may be long at the end of a shifted schedule.
    """
    return TOO_LONG if len(computed) < FEWEST else ""
