"""Apply Cache Settings: the caches of one node on further models, such as the second expert of Wan 2.2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..cache_core.adapters.comfyui import with_cache
from ..cache_core.strategy.strategy import Strategy
from . import runs
from .compat import SEARCH_ALIASES, own_id, schema
from .inputs import check_inputs

SETTINGS = io.Custom("REFRAIN_SETTINGS")  # a tuple of strategies
SETTINGS_NAME = "settings for another model"
FROM = f"From the output '{SETTINGS_NAME}' of a cache node or of Faster Sampling."
SETTINGS_TOOLTIP = (
    "For Apply Cache Settings: makes another model faster in the same way, such as the second one of Wan 2.2."
)


def settings_output() -> Any:
    """The output that a cache node has for Apply Cache Settings."""
    return SETTINGS.Output(display_name=SETTINGS_NAME, tooltip=SETTINGS_TOOLTIP)


def with_caches(model: Any, strategies: Sequence[Strategy], node_id: str, steps: int = 0) -> Any:
    """The model with these caches, chosen for so many steps (0: any), whose runs this node shows; as it is without."""
    for strategy in strategies:
        model = with_cache(model, strategy, watch=runs.watch, owner=node_id, steps=steps)
    return model


class ApplySettings(io.ComfyNode):
    """A model with the caches of another."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefrainApplySettings",
            display_name="Apply Cache Settings",
            description="Makes a second model faster. Gives it the caches of another cache node, so that one node sets "
            "several models, such as the two of Wan 2.2. The models share settings, not what is stored while they run. "
            "Connect it last, right before the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model to make faster, after LoRAs and other patches."),
                SETTINGS.Input("settings", tooltip=FROM),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same model, sampling with these caches.")],
            search_aliases=["second model", "Wan 2.2", *SEARCH_ALIASES],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # or two nodes with the same inputs would share one id
        )

    @classmethod
    def execute(cls, model: Any, settings: Sequence[Strategy]) -> io.NodeOutput:
        check_inputs(cls, model=model, settings=settings)
        return io.NodeOutput(with_caches(model, settings, own_id(cls)))
