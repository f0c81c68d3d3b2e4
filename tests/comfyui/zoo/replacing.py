"""Blocks run by another pack's `patches_replace`, whatever form their streams have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SIZE = 0.3  # of what is added, beside features near 1


def replaced_blocks(count: int, key: str = "double_block", stream: str | None = "img") -> Callable[[Any], Any]:
    """An addition: a patch runs each block and changes what comes out under `stream`, or the bare output if None."""

    def replace(given: dict, extra: dict) -> Any:
        output = extra["original_block"](given)
        return _changed(output) if stream is None else {**output, stream: _changed(output[stream])}

    def add(patcher: Any) -> Any:
        clone = patcher.clone()
        for index in range(count):
            clone.set_model_patch_replace(replace, "dit", key, index)
        return clone

    return add


def _changed(streams: Any) -> Any:
    if isinstance(streams, tuple):  # video and sound
        return tuple(_changed(stream) for stream in streams)
    return streams + SIZE * streams.roll(1, dims=1)
