"""Settings: fields of a strategy with a range or choices, and the words that a user reads."""

from __future__ import annotations

import re
import reprlib
from dataclasses import field
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    step: float | None = None,
    shown: bool = True,
) -> Any:
    """A field of a strategy: its default, its range or choices, and the words a user reads.

    `shown=False` keeps it off the node: for scripts and for parity with other implementations.
    """
    metadata = dict(help=help, minimum=minimum, maximum=maximum, choices=choices, step=step, shown=shown)
    return field(default=default, metadata=metadata)


def counted(count: int, noun: str) -> str:
    """So many of something, in words: "1 step", "2 steps"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def check(title: str, name: str, value: Any, default: Any, allowed: Any) -> None:
    low, high, choices = allowed["minimum"], allowed["maximum"], allowed["choices"]
    told = f"{title}: {name} is {reprlib.repr(value)}"  # shortened: nodes may hand on anything
    if choices and not (isinstance(value, str) and value in choices):
        raise ValueError(f"{told}. Choose one of: {', '.join(choices)}.")
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"{told}. Set it to True or False.")
    if low is None:
        return
    whole = " a whole number" if isinstance(default, int) else ""
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN is not
        raise ValueError(f"{told}. Set it to{whole or ' a number'} between {low:g} and {high:g}.")


def check_expressions(title: str, name: str, expressions: object) -> None:
    """Raise ValueError for what is no tuple of regular expressions, and not None."""
    if expressions is None:
        return
    if not isinstance(expressions, (tuple, list)) or not all(isinstance(item, str) for item in expressions):
        raise ValueError(f"{title}: {name} is {expressions!r}. Set it to a tuple of regular expressions, or to None.")
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(
                f"{title}: {name} holds {expression!r}, which is no regular expression ({error}). "
                f"Escape its special characters."
            ) from None
