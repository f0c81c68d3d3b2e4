"""Which family of the presets a MODEL belongs to, by ComfyUI's class for it."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ...presets import OTHER, UNET

KEY = "refrain_family"  # what a MODEL that we made ourselves says of itself
FAMILIES = {  # by the very class in comfy.supported_models: a model derived from another may need other settings
    "Flux": "Flux.1",
    "FluxInpaint": "Flux.1",
    "Flux2": "Flux.2",
    "SD3": "Stable Diffusion 3",
    "QwenImage": "Qwen-Image",
    "HunyuanVideo": "HunyuanVideo",
    "HunyuanVideoI2V": "HunyuanVideo",
    "LTXV": "LTX-Video",
    "WAN21_T2V": "Wan 2.1 and 2.2",
    "WAN21_I2V": "Wan 2.1 and 2.2",
    "MiniMaxH3": "MiniMax-H3",
    "GenmoMochi": "Mochi",
}


def family_of(model: ModelPatcher) -> str:
    """One of the presets' families."""
    if own := model.get_attachment(KEY):
        return own
    if type(model.model.diffusion_model).__name__ == "UNetModel":
        return UNET
    return FAMILIES.get(class_of(model), OTHER)


def class_of(model: ModelPatcher) -> str:
    """ComfyUI's name for the kind of model."""
    return type(model.model.model_config).__name__
