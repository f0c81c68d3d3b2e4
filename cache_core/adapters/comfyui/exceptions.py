"""What discovery can't find out by watching: the exceptions among ComfyUI's models, and why each is one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...strategy.strategy import Strategy

# Modules, by their class, that the model runs by another method than forward.
METHODS = {
    "WanAnimate2Block": "forward_gen",  # the picture's pass; forward_pose, the pose's, runs beside it and always
    "WanAnimate2SelfAttention": "forward_gen",
}

# Models, by their class, that swap the halves of a joined batch inside: a row there is another branch's than outside.
MODELS_THAT_SWAP_BRANCHES = {"HunYuanDiTPlain", "NaDiT"}

# Other nodes that leave out model calls, by the transformer option that shows them before the first step. Others are
# noticed when they first answer a call.
OTHER_CACHES = {
    "easycache": "EasyCache or LazyCache",
    "rel_l1_thresh": "TeaCache",
    "magcache_thresh": "MagCache",
    "cache_dit_turbo": "CacheDiT",
    "tea_cache_attr": "TeaCache (ComfyUI_Patches_ll)",
    "fb_cache_attr": "First Block Cache (ComfyUI_Patches_ll)",
}

# Patches after attention that may mix the rows of the prompts, as NAGuidance does.
PATCHES_THAT_MIX_PROMPTS = {"attn1_output_patch", "attn2_output_patch"}


def refuse_other_caches(strategies: Iterable[Strategy], transformer_options: dict[str, Any]) -> None:
    """Raises ValueError where another cache leaves out the model calls that one of these strategies forecasts.

    Each would take the other's guesses for what the model computes; measured, that is worse than either alone.
    """
    others = [title for option, title in OTHER_CACHES.items() if option in transformer_options]
    for strategy in strategies:
        if others and strategy.stands_in_for_calls:
            raise ValueError(
                f"{strategy.title}: {others[0]} is on this model and caches the same calls. Remove one of the two "
                f"nodes. (Pyramid Attention Broadcast and FasterCache may stay beside it.)"
            )


def why_computed(transformer_options: dict[str, Any]) -> str | None:
    """Why a model call must be computed whatever the strategy says, or None."""
    if "ar_state" in transformer_options:
        return "the model draws frame by frame and its blocks fill a cache of their own, so they always run"
    return None


def of_its_own(control: Any) -> Any:
    """A ControlNet's signal that the model may take apart: HunyuanDiT empties its lists, and may be run again."""
    if not isinstance(control, dict):
        return control
    return {part: list(members) if isinstance(members, list) else members for part, members in control.items()}
