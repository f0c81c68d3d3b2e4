"""Settings: fields of a strategy with a range or choices, and the words that a user reads."""

from __future__ import annotations

import re
import reprlib
from dataclasses import field
from typing import Any

import torch

UNTIL_SKIPPED = "; up to twice that until the negative prompt is first skipped"


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    step: float | None = None,
    shown: bool = True,
    is_first: bool = False,
    is_optional: bool = False,
) -> Any:
    """A field of a strategy: its default, its range or choices, and the words a user reads.

    `shown=False` keeps it off the node: for scripts and for parity with other implementations. `is_first` is for
    the one setting to turn: ComfyUI shows the others among the advanced ones. `is_optional` lets prompts go without it
    that were saved before there was this setting.
    """
    metadata = dict(help=help, minimum=minimum, maximum=maximum, choices=choices, step=step, shown=shown)
    return field(default=default, metadata=metadata | dict(is_first=is_first, is_optional=is_optional))


def sizes(*each: str) -> str:
    """GiB that README's table says a cache wants, of pictures of 1024 x 1024 and videos of 81 frames."""
    told = "Flux {} GB, Qwen-Image {} GB, Wan 14B {} GB (480p), {} GB (720p), MiniMax-H3 {} GB"
    return told.format(*each)


def memory_limit(sites: str, outputs: int, *each: str, skips_negative: bool = False) -> Any:
    """The setting `memory_limit_gb`, in GiB, and what one or two outputs of each site take of some models."""
    prompts, more = ("", UNTIL_SKIPPED) if skips_negative else (" for each prompt", "")
    return setting(
        0.0,
        f"Lower is slower. Memory that this cache may hold, in GB; the {sites} that do not fit always run. "
        f"{('One output', 'Two outputs')[outputs - 1]} of each{prompts}: {sizes(*each)}{more}. Usual: 0, which is "
        "what is free beside the model.",
        minimum=0.0,
        maximum=1000.0,
        step=0.5,
        is_optional=True,
    )


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


def as_expressions(title: str, name: str, expressions: Any) -> tuple[str, ...] | None:
    """These as a tuple. Raises ValueError for what are no regular expressions, and not None."""
    if expressions is None:
        return None
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
    return tuple(expressions)


def fits(name: str, expressions: tuple[str, ...]) -> bool:
    """Whether the whole name is as one of these says."""
    return any(re.fullmatch(expression, name) for expression in expressions)


def check_dtype(title: str, name: str, dtype: object) -> None:
    """Raise ValueError for what is no floating-point type, and not None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{title}: {name} is {dtype!r}. Set it to a floating-point torch.dtype, or to None.")
