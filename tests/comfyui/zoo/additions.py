"""What else may flow beside the blocks of a model: a ControlNet's signal, the patches of other packs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .architecture import Draw

Addition = Callable[[Any], Any]  # of a patcher: a clone that has it
SIZE = 0.3  # of what is added, beside features near 1


def controlled(**signals: tuple[int, ...]) -> Addition:
    """A ControlNet's signal: for each of its lists, "input" or "output", how many tensors of which shape."""

    def add(patcher: Any) -> Any:
        from comfy.patcher_extension import WrappersMP

        draw = Draw(4)
        tensors = {part: [SIZE * draw(*shape) for _ in range(count)] for part, (count, *shape) in signals.items()}

        def apply(
            executor: Any, x: Any, t: Any, c_concat: Any, c_crossattn: Any, _: Any, *args: Any, **kwargs: Any
        ) -> Any:
            signal = {part: list(members) for part, members in tensors.items()}  # HunyuanDiT empties the lists
            return executor(x, t, c_concat, c_crossattn, signal, *args, **kwargs)

        clone = patcher.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "zoo control", apply)
        return clone

    return add


def patched(name: str) -> Addition:
    """Another pack's patch of this name ("double_block", "post_input"): it adds to the picture's tokens."""

    def add(patcher: Any) -> Any:
        clone = patcher.clone()
        clone.set_model_patch(lambda given: {**given, "img": given["img"] + SIZE * given["img"].roll(1, dims=1)}, name)
        return clone

    return add
