"""Other packs' nodes that are not there any more, and which of ours ComfyUI (0.14 and newer) may put in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from comfy_api.latest import io

from ..cache_core.strategies.first_block import FirstBlockCache
from ..cache_core.strategies.taylorseer import TaylorSeerCache
from ..cache_core.strategy.strategy import Strategy
from .compat import prompt_server


@dataclass(frozen=True)
class OldNode:
    """A MODEL -> MODEL node of another pack. What it has no setting for takes our default."""

    node_id: str
    strategy: type[Strategy]
    widgets: Mapping[str, Any]  # all of them, in the order of saved workflows, with their defaults
    settings: Mapping[str, str]  # ours: its widget

    def replacement(self) -> Any:
        """The same as an io.NodeReplace."""
        shown = [setting for setting in fields(self.strategy) if setting.metadata.get("shown")]
        carried = [{"new_id": ours, "old_id": widget} for ours, widget in self.settings.items()]
        added = [{"new_id": ours.name, "set_value": ours.default} for ours in shown if ours.name not in self.settings]
        return io.NodeReplace(
            new_node_id=f"Refrain{self.strategy.__name__}",
            old_node_id=self.node_id,
            old_widget_ids=list(self.widgets),
            input_mapping=[{"new_id": "model", "old_id": "model"}, *carried, *added],
            output_mapping=[{"new_idx": 0, "old_idx": 0}],
        )


_WAVESPEED = OldNode(  # chengzeyi/Comfy-WaveSpeed 1.1.8
    "ApplyFBCacheOnModel",
    FirstBlockCache,
    {
        "object_to_patch": "diffusion_model",
        "residual_diff_threshold": 0.0,
        "start": 0.0,
        "end": 1.0,
        "max_consecutive_cache_hits": -1,
    },
    {
        "residual_diff_threshold": "residual_diff_threshold",
        "start_percent": "start",
        "end_percent": "end",
        "max_consecutive_cache_hits": "max_consecutive_cache_hits",
    },
)
_TAYLORSEER, _TAYLORSEER_LITE = (  # philipy1219/ComfyUI-TaylorSeer
    OldNode(
        node_id,
        TaylorSeerCache,
        {"model_type": "flux", "fresh_threshold": 6, "max_order": 2, "first_enhance": 3, "last_enhance": 50},
        {
            "cache_interval": "fresh_threshold",
            "max_order": "max_order",
            "disable_cache_before_step": "first_enhance",
            "disable_cache_after_step": "last_enhance",
        },
    )
    for node_id in ("TaylorSeer", "TaylorSeerLite")
)
_PERCENTS = {"start_percent": "start_percent", "end_percent": "end_percent"}
_TEACACHE = OldNode(  # welltop-cn/ComfyUI-TeaCache 1.9.0; its threshold is on another scale
    "TeaCache",
    FirstBlockCache,
    {"model_type": "flux", "rel_l1_thresh": 0.4, "start_percent": 0.0, "end_percent": 1.0, "cache_device": "cuda"},
    _PERCENTS,
)
_WAN_TEACACHE = OldNode(  # kijai/ComfyUI-KJNodes, where it is deprecated and returns the model as it is
    "WanVideoTeaCacheKJ",
    FirstBlockCache,
    {
        "rel_l1_thresh": 0.275,
        "start_percent": 0.1,
        "end_percent": 1.0,
        "cache_device": "offload_device",
        "coefficients": "i2v_480",
    },
    _PERCENTS,
)
_OLD = (_WAVESPEED, _TAYLORSEER, _TAYLORSEER_LITE, _TEACACHE, _WAN_TEACACHE)
OLD_NODES = {old.node_id: old for old in _OLD}


async def register() -> None:
    """Offer the replacements, where this ComfyUI knows such a thing. It replaces only nodes that it does not have.

    Its server does it: where ComfyUI is used as a library there is none.
    """
    server = prompt_server()
    if server is None or not hasattr(io, "NodeReplace"):
        return
    from comfy_api.latest import ComfyAPI

    for old in OLD_NODES.values():
        await ComfyAPI().node_replacement.register(old.replacement())
    server.add_on_prompt_handler(completed)


def completed(request: dict[str, Any]) -> dict[str, Any]:
    """The request to queue a prompt, its old nodes with all that replacing them reads.

    ComfyUI 0.33 answers 500 where a node has no title, as in prompts written by hand, or lacks an input.
    """
    prompt = request.get("prompt")
    for node in prompt.values() if isinstance(prompt, dict) else ():
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
            old = OLD_NODES.get(str(node.get("class_type")))
            if old is not None:
                node.setdefault("_meta", {})
                node["inputs"] = {**old.widgets, **node["inputs"]}
    return request
