"""Faster Sampling: a strategy and its settings for the model at hand, and on whose word."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..cache_core.adapters.comfyui import strategies_of
from ..cache_core.adapters.comfyui.families import class_of, family_of
from ..cache_core.adapters.comfyui.identity import identity_of
from ..cache_core.presets import BALANCED, QUALITIES, TOO_FEW_STEPS, WISH_FOR, choose
from . import measured_file
from .compat import KNOWS_ADVANCED, SPEED_WORDS, own_id, schema
from .inputs import check_inputs
from .settings_node import settings_output, with_caches

KNOWN_CACHES = ["TeaCache", "EasyCache", "FBCache", "First Block Cache", "WaveSpeed", "MagCache", "TaylorSeer"]


class CachePreset(io.ComfyNode):
    """A model with the cache that is known to suit it, or a cautious one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefrainCachePreset",
            display_name="Faster Sampling",
            description="Makes sampling faster. Chooses a cache and its settings by the kind of model and the number "
            "of steps, and says why: measured here, published by others, or a cautious choice. Connect it last, right "
            "before the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model to make faster, after LoRAs and other patches."),
                io.Combo.Input(
                    "quality",
                    options=list(QUALITIES),
                    default=BALANCED,
                    tooltip="Faster, or closer to the uncached picture. What you wish for: 'visually identical' is the "
                    "most careful preset, 'fast' the boldest, 'balanced' in between. The output choice says how near "
                    "it comes to that. Usual: 'balanced'.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip=f"Usual: 0, which reads the steps from the run. Higher says them beforehand: up to "
                    f"{TOO_FEW_STEPS} the model is handed on without a cache.",
                    **({"advanced": True} if KNOWS_ADVANCED else {}),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The same model, sampling with the chosen cache."),
                settings_output(),
                io.String.Output(display_name="choice", tooltip="What was chosen, and why."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # or two nodes with the same inputs would share one id
            has_intermediate_output=True,  # what it says is sent again where its result is taken over
            search_aliases=[*SPEED_WORDS, *KNOWN_CACHES, "preset", "auto cache", "cache", "Refrain"],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Chosen anew once something has been measured."""
        return measured_file.stamp()

    @classmethod
    def execute(cls, model: Any, quality: str, steps: int) -> io.NodeOutput:
        check_inputs(cls, model=model, quality=quality, steps=steps)
        measured = measured_file.known(identity_of(model), WISH_FOR[quality], steps)
        choice = choose(family_of(model), quality, steps, class_of(model), measured)
        cached = with_caches(model, [choice.strategy] if choice.strategy else [], own_id(cls), choice.steps or steps)
        return io.NodeOutput(cached, strategies_of(cached), choice.words, ui={"text": [choice.words]})
