"""What discovery can't find out by watching: the exceptions among ComfyUI's models, and why each is one."""

from __future__ import annotations

from typing import Any

# Blocks, by their class, that the model runs by another method than forward.
METHODS = {
    "WanAnimate2Block": "forward_gen",  # the picture's pass; forward_pose, the pose's, runs beside it and always
}

# Models, by their class, that swap the halves of a joined batch inside: a row there is another branch's than outside.
SWAPPING = {"HunYuanDiTPlain", "NaDiT"}


def why_computed(transformer_options: dict[str, Any]) -> str | None:
    """Why a model call must be computed whatever the strategy says, or None."""
    if "ar_state" in transformer_options:
        return "the model draws frame by frame and its blocks fill a cache of their own, so they always run"
    return None
