"""The node of a caching strategy, made from the strategy's settings."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from comfy_api.latest import io

from ..cache_core.adapters.comfyui import strategies_of
from ..cache_core.strategy.strategy import Strategy
from .compat import KNOWS_ADVANCED, SEARCH_ALIASES, own_id, schema
from .inputs import check_names
from .settings_node import settings_output, with_caches


def cache_node(strategy: type[Strategy]) -> type[io.ComfyNode]:
    """A MODEL -> MODEL node with an input for each setting that the strategy shows."""

    class Apply(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return schema(
                node_id=f"Refrain{strategy.__name__}",
                display_name=f"Apply {strategy.title}",
                description=f"{strategy.summary} Connect it last, right before the sampler. Source: {strategy.source}.",
                inputs=[
                    io.Model.Input("model", tooltip="The model to make faster, after LoRAs and other patches."),
                    *(_input(setting) for setting in fields(strategy) if setting.metadata.get("shown")),
                ],
                outputs=[
                    io.Model.Output(display_name="model", tooltip="The same model, sampling with this cache."),
                    settings_output(),
                ],
                search_aliases=[strategy.title, *strategy.aliases, *SEARCH_ALIASES],
                hidden=[io.Hidden.unique_id],
                not_idempotent=True,  # two nodes with the same inputs would share one id; unlike its name, it caches
            )

        @classmethod
        def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
            check_names(cls, *settings)
            cached = with_caches(model, [strategy(**settings)], own_id(cls))
            return io.NodeOutput(cached, strategies_of(cached))

    Apply.__name__ = Apply.__qualname__ = f"Apply{strategy.__name__}"
    return Apply


def _input(setting: Field) -> Any:
    allowed, default = setting.metadata, setting.default
    words = {"default": default, "tooltip": allowed["help"], "optional": allowed["is_optional"]}
    if KNOWS_ADVANCED:
        words["advanced"] = not allowed["is_first"]
    if allowed["choices"]:
        return io.Combo.Input(setting.name, options=list(allowed["choices"]), **words)
    bounds = {"min": allowed["minimum"], "max": allowed["maximum"]}
    if isinstance(default, float):
        return io.Float.Input(setting.name, step=allowed["step"], round=False, **bounds, **words)
    return io.Int.Input(setting.name, **bounds, **words)
