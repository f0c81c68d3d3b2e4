"""Apply Cache Settings: the caches of one node on further models, such as the second expert of Wan 2.2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..cache_core.adapters.comfyui import with_cache
from ..cache_core.strategy.strategy import Strategy
from . import runs
from .compat import own_id, schema
from .inputs import check_inputs

SETTINGS = io.Custom("REFRAIN_SETTINGS")  # a tuple of strategies
SETTINGS_TOOLTIP = "The caches of this model, for Apply Cache Settings: to give another model the same ones."


def settings_output() -> Any:
    """The output that a cache node has for Apply Cache Settings."""
    return SETTINGS.Output(display_name="settings", tooltip=SETTINGS_TOOLTIP)


def with_caches(model: Any, strategies: Sequence[Strategy], node_id: str) -> Any:
    """The model with these caches, whose runs this node shows; the model as it is if there are none."""
    for strategy in strategies:
        model = with_cache(model, strategy, watch=runs.watch, owner=node_id)
    return model


class ApplySettings(io.ComfyNode):
    """A model with the caches of another."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefrainApplySettings",
            display_name="Apply Cache Settings",
            description="Gives a model the caches of another cache node, so that one node sets several models, such as "
            "the two experts of Wan 2.2. The models share settings, not what is stored while they run. Connect it "
            "last, right before the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model to make faster, after LoRAs and other patches."),
                SETTINGS.Input("settings", tooltip="From the settings output of a cache node or of Cache Preset."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same model, sampling with these caches.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # or two nodes with the same inputs would share one id
        )

    @classmethod
    def execute(cls, model: Any, settings: Sequence[Strategy]) -> io.NodeOutput:
        check_inputs(cls, model=model, settings=settings)
        return io.NodeOutput(with_caches(model, settings, own_id(cls)))
