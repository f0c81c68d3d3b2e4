"""Which family of the presets a MODEL belongs to, by ComfyUI's class for it."""

from __future__ import annotations

from ...presets import OTHER, UNET
from .seams import ModelPatcher

KEY = "refrain_family"  # what a MODEL that we made ourselves says of itself
WAN, OTHER_WAN = "Wan 2.1 and 2.2, text or image to video", "Wan 2.1 and 2.2, other kinds"
FAMILIES = {  # by the name of the very class in comfy.supported_models, which other versions of ComfyUI may lack
    "Flux": "Flux.1",
    "FluxInpaint": "Flux.1",
    "Flux2": "Flux.2",
    "SD3": "Stable Diffusion 3",
    "QwenImage": "Qwen-Image",
    "QwenImage21": "Qwen-Image 2.1",
    "HunyuanVideo": "HunyuanVideo",
    "HunyuanVideoI2V": "HunyuanVideo",
    "HunyuanVideo15": "HunyuanVideo 1.5",
    "LTXV": "LTX-Video",
    "LTXAV": "LTX-2",
    "WAN21_T2V": WAN,  # of Wan 2.2 also image to video, Fun Control and Fun Inpaint
    "WAN21_I2V": WAN,
    "WAN21_FunControl2V": OTHER_WAN,
    "WAN21_Camera": OTHER_WAN,
    "WAN21_Vace": OTHER_WAN,
    "WAN21_HuMo": OTHER_WAN,
    "WAN22_Camera": OTHER_WAN,
    "WAN22_S2V": OTHER_WAN,
    "WAN22_Animate": OTHER_WAN,
    "WAN22_T2V": OTHER_WAN,  # 5B
    "MiniMaxH3": "MiniMax-H3",
    "GenmoMochi": "Mochi",
    "HiDream": "HiDream",
    "ACEStep": "ACE-Step",
    "ACEStep15": "ACE-Step",
    "Anima": "Anima",
    "Kandinsky5": "Kandinsky 5",
    "Kandinsky5Image": "Kandinsky 5",
    "Chroma": "Chroma",
}


def family_of(model: ModelPatcher) -> str:
    """One of the presets' families."""
    if own := model.get_attachment(KEY):
        return own
    if type(getattr(model.model, "diffusion_model", None)).__name__ == "UNetModel":
        return UNET
    return FAMILIES.get(class_of(model), OTHER)


def class_of(model: ModelPatcher) -> str:
    """ComfyUI's name for the kind of model."""
    return type(getattr(model.model, "model_config", None)).__name__
