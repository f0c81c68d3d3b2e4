"""The node of a caching strategy, made from the strategy's settings."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from comfy_api.latest import io

from ..cache_core.adapters.comfyui import with_cache
from ..cache_core.strategy import Strategy
from . import runs
from .compat import schema


def cache_node(strategy: type[Strategy]) -> type[io.ComfyNode]:
    """A MODEL -> MODEL node with an input for each setting that the strategy shows."""

    class Apply(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return schema(
                node_id=f"Refrain{strategy.__name__}",
                display_name=f"Apply {strategy.title}",
                description=f"{strategy.summary} After {strategy.source}. Connect it last, right before the sampler.",
                inputs=[
                    io.Model.Input("model", tooltip="The model to make faster, after LoRAs and other patches."),
                    *(_input(setting) for setting in fields(strategy) if setting.metadata.get("shown")),
                ],
                outputs=[io.Model.Output(display_name="model", tooltip="The same model, sampling with this cache.")],
            )

        @classmethod
        def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
            return io.NodeOutput(with_cache(model, strategy(**settings), on_report=runs.record))

    Apply.__name__ = Apply.__qualname__ = f"Apply{strategy.__name__}"
    return Apply


def _input(setting: Field) -> Any:
    allowed, default = setting.metadata, setting.default
    words = {"default": default, "tooltip": allowed["help"]}
    if allowed["choices"]:
        return io.Combo.Input(setting.name, options=list(allowed["choices"]), **words)
    bounds = {"min": allowed["minimum"], "max": allowed["maximum"]}
    if isinstance(default, float):
        return io.Float.Input(setting.name, step=allowed["step"], round=False, **bounds, **words)
    return io.Int.Input(setting.name, **bounds, **words)
