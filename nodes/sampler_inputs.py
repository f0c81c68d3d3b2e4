"""What the nodes share that sample by themselves: the inputs of a KSampler, what they refuse, and their sheets."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..cache_core.adapters.comfyui import strategies_of
from ..cache_core.adapters.comfyui.sampling import SAMPLERS, SCHEDULERS

SEED = "The noise that all runs begin with. Higher or lower only gives another picture. Usual: 0 or any."


def sampler_inputs(seed: str = SEED, another_seed: bool = True) -> list[Any]:
    """Inputs as a KSampler has them. `another_seed`: the page draws one after each prompt."""
    steps = (
        "Steps of the uncached and the cached runs. Higher is slower and finer. Usual: 20 to 50, as on your sampler."
    )
    cfg = "How closely all runs follow the prompt. Higher is more literal. Usual: 1 to 8, as on your sampler."
    denoise = (
        "How much of the latent all runs replace. Lower keeps more of it. Usual: 1, or less for a picture's latent."
    )
    latent = "The latent to denoise. Of a batch or a video all pictures are measured."
    return [
        io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=another_seed, tooltip=seed),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=steps),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=cfg),
        io.Combo.Input("sampler_name", options=list(SAMPLERS), tooltip="The sampler of all runs. Usual: 'euler'."),
        io.Combo.Input("scheduler", options=list(SCHEDULERS), tooltip="The schedule of all runs. Usual: 'simple'."),
        io.Conditioning.Input("positive", tooltip="The prompt."),
        io.Conditioning.Input("negative", tooltip="The negative prompt."),
        io.Latent.Input("latent_image", tooltip=latent),
        io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=denoise),
    ]


def refuse_a_cache(model: Any, told: str) -> None:
    """Raises ValueError, in these words, where the model that is to be sampled uncached has a cache that is on."""
    active = [strategy.title for strategy in strategies_of(model) if not strategy.is_off]
    if active:
        raise ValueError(told.format(" and ".join(active)))


def as_image(sheet: Any) -> torch.Tensor:
    """A Pillow image as ComfyUI's IMAGE: (1, height, width, 3) in 0..1."""
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, sheet.height, sheet.width, 3) / 255
