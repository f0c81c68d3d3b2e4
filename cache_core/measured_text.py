"""Entries of measured settings as the text of a file, and back: whoever wrote it, only what a search gives is read."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import date
from typing import Any

from .compare.found import SPEED_UP, Wish
from .measured import MOST_DECIBELS, MOST_ENTRIES, Identity, Measured
from .strategies.first_block import FirstBlockCache
from .strategies.taylorseer import TaylorSeerCache
from .strategy.strategy import Strategy

VERSION = 1
MOST_BYTES = 512 * 1024  # of a file; an entry takes half a kilobyte, two at most
SETTINGS: Mapping[str, tuple[type[Strategy], tuple[str, ...]]] = {  # the first of these must be there
    "FirstBlockCache": (FirstBlockCache, ("residual_diff_threshold", "repair")),
    "TaylorSeerCache": (TaylorSeerCache, ("cache_interval", "repair", "target_speedup")),
}


class Newer(ValueError):
    """The file is of a later version of Refrain."""


def as_text(entries: Iterable[Measured]) -> str:
    """The file's text."""
    return (
        json.dumps({"version": VERSION, "entries": [_as_json(each) for each in entries]}, ensure_ascii=False, indent=1)
        + "\n"
    )


def from_text(text: bytes) -> tuple[Measured, ...]:
    """The entries of a file that anybody may have written. Raises ValueError, in a few words, if anything is wrong."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes")
    try:
        told = json.loads(text.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(told, dict) or type(told.get("version")) is not int:
        raise ValueError("it says no version")
    if told["version"] > VERSION:
        raise Newer(f"it is of version {reprlib.repr(told['version'])}, this Refrain reads {VERSION}")
    entries = told.get("entries")
    if told["version"] != VERSION or set(told) != {"version", "entries"} or not isinstance(entries, list):
        raise ValueError("it is no list of entries")
    if len(entries) > MOST_ENTRIES:
        raise ValueError(f"it has more than {MOST_ENTRIES} entries")
    return tuple(map(_from_json, entries))


def _as_json(entry: Measured) -> dict[str, Any]:
    kind = type(entry.strategy).__name__
    settings = {name: getattr(entry.strategy, name) for name in SETTINGS[kind][1]}
    told = {name: value for name, value in vars(entry).items() if name not in ("model", "strategy", "is_shared")}
    return {"model": asdict(entry.model), **told, "strategy": kind, "settings": settings}


def _from_json(told: Any) -> Measured:
    fields = _checked(told, _ENTRY)
    kind, settings = fields.pop("strategy"), fields.pop("settings")
    wish = Wish(fields["wish"])  # raises for one that there is not
    if (wish.name == SPEED_UP) != (fields["wished_speed_up"] > 0):
        raise ValueError("a wish and its speed-up contradict each other")
    if kind not in SETTINGS:
        raise ValueError(f"there is no strategy {reprlib.repr(kind)}")
    strategy, allowed = SETTINGS[kind]
    if not set(settings) <= set(allowed) or allowed[0] not in settings:
        raise ValueError(f"{kind} has settings that a search does not set")
    made = strategy(**settings)  # raises for values out of range
    if made.is_off or made.contradiction:
        raise ValueError(f"{kind} saves nothing with its settings")
    return Measured(**fields | {"model": Identity(**_checked(fields["model"], _MODEL))}, strategy=made)


def _checked(told: Any, fields: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    if not isinstance(told, dict) or set(told) != set(fields):
        raise ValueError("an entry has other fields than it should")
    for name, is_right in fields.items():
        if not is_right(told[name]):
            raise ValueError(f"{name} is {reprlib.repr(told[name])}")
    return dict(told)


def _number(low: float, high: float, *kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in (kinds or (int, float)) and low <= value <= high


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _is_date(value: Any) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
        return False
    try:
        return bool(date.fromisoformat(value))
    except ValueError:
        return False


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[0-9a-f]{32}", value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_MODEL = {
    "family": _is_text,
    "tensors": _number(0, 10**7, int),
    "parameters": _number(0, 10**14, int),
    "weights": _is_digest,
    "halfway": _number(0, 1e6),
}
_ENTRY = {
    "model": _is_object,
    "wish": _is_text,
    "wished_speed_up": _number(0, 100),
    "steps": _number(1, 10000, int),
    "sampler": _is_text,
    "scheduler": _is_text,
    "cfg": _number(0, 100),
    "strategy": _is_text,
    "settings": _is_object,
    "speed_up": _number(0, 10000),
    "decibels": _number(-MOST_DECIBELS, MOST_DECIBELS),
    "date": _is_date,
    "device": _is_text,
}


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")
