"""Compare Cache Settings: one seed uncached, with caches, and with the fewer steps that take the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..cache_core.adapters.comfyui import strategies_of
from ..cache_core.adapters.comfyui.sampling import SAMPLERS, SCHEDULERS, SamplerInputs
from ..cache_core.compare.layouts import against_fewer_steps
from ..cache_core.compare.side_by_side import rows, table
from ..cache_core.strategy.setting import counted
from .comparing import Comparison
from .compat import schema
from .inputs import check_inputs

CACHED = ("cached_1", "cached_2", "cached_3")
NOTHING_TO_COMPARE = "Connect at least one model with a cache to cached_1, cached_2 or cached_3."
ALREADY_CACHED = (
    "The model samples with {}, so there would be no uncached picture to compare with. Connect the model as it is "
    "before the cache node to the input model, and the cache node's output to cached_1."
)
IMAGES = (
    "The pictures in full size: the uncached one, then each cache's, then those of fewer steps. Of a batch the first "
    "picture of each, of a video the middle frame, as on the sheet."
)
MEASURED = "Seconds are of sampling alone, with the models loaded before. PSNR and SSIM are to the uncached picture"


class CompareSettings(io.ComfyNode):
    """Samples the same seed again and again, and shows what each cache changed and gained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefrainCacheCompare",
            display_name="Compare Cache Settings",
            description="Samples the same seed uncached and with up to three caches, and shows them side by side with "
            "their differences, times and distances from the uncached picture. For each cache it also samples uncached "
            "with as many steps as take the same time: a cache is worth it only if it is closer than that.",
            inputs=[
                io.Model.Input("model", tooltip="The model without a cache, after LoRAs and other patches."),
                *_sampler_inputs(),
                io.Vae.Input("vae", tooltip="The VAE that turns the samples into pictures."),
                *(io.Model.Input(name, optional=True, tooltip="The same model after a cache node.") for name in CACHED),
            ],
            outputs=[
                io.Image.Output(display_name="comparison", tooltip="Pictures, differences and numbers on one sheet."),
                io.String.Output(display_name="table", tooltip="The numbers and verdicts as aligned text."),
                io.Image.Output(display_name="images", tooltip=IMAGES),
            ],
            is_output_node=True,
            search_aliases=["compare", "A/B", "benchmark", "PSNR", "SSIM", "Refrain", "cache"],
        )

    @classmethod
    def execute(cls, model: Any, steps: int, vae: Any, **inputs: Any) -> io.NodeOutput:
        check_inputs(cls, model=model, steps=steps, vae=vae, **inputs)
        models = [inputs.pop(name) for name in CACHED if inputs.get(name) is not None]
        sampler = SamplerInputs(**{name: value for name, value in inputs.items() if name not in CACHED})
        _check(model, models)
        comparison = Comparison(model, models, steps, sampler, vae)
        compared = comparison.run()
        measured = f"{MEASURED}{comparison.of_how_many}."
        method = f"{sampler.sampler_name}, {sampler.scheduler}"
        title = f"{counted(steps, 'step')}, {method}, cfg {sampler.cfg:g}, seed {sampler.seed}"
        picture = _as_image(against_fewer_steps(compared, title, measured))
        text = f"{table(compared.runs)}\n{measured}"
        shown = {"refrain_comparison": [{"rows": rows(compared.runs), "measured": measured}], "text": [text]}
        images = compared.pictures.movedim(1, -1).contiguous()
        preview = getattr(ui, "PreviewImage", None)  # a ComfyUI may call it otherwise; the outputs have it all
        drawn = preview(picture, cls=cls).as_dict() if preview else {}
        return io.NodeOutput(picture, text, images, ui={**drawn, **shown})


def _sampler_inputs() -> list[Any]:
    seed = "The noise that all runs begin with. Higher or lower only gives another picture. Usual: 0 or any."
    steps = (
        "Steps of the uncached and the cached runs. Higher is slower and finer. Usual: 20 to 50, as on your sampler."
    )
    cfg = "How closely all runs follow the prompt. Higher is more literal. Usual: 1 to 8, as on your sampler."
    denoise = (
        "How much of the latent all runs replace. Lower keeps more of it. Usual: 1, or less for a picture's latent."
    )
    latent = "The latent to denoise. Of a batch or a video all pictures are measured."
    return [
        io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip=seed),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=steps),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=cfg),
        io.Combo.Input("sampler_name", options=list(SAMPLERS), tooltip="The sampler of all runs. Usual: 'euler'."),
        io.Combo.Input("scheduler", options=list(SCHEDULERS), tooltip="The schedule of all runs. Usual: 'simple'."),
        io.Conditioning.Input("positive", tooltip="The prompt."),
        io.Conditioning.Input("negative", tooltip="The negative prompt."),
        io.Latent.Input("latent_image", tooltip=latent),
        io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=denoise),
    ]


def _check(model: Any, models: Sequence[Any]) -> None:
    if not models:
        raise ValueError(NOTHING_TO_COMPARE)
    active = [strategy.title for strategy in strategies_of(model) if not strategy.is_off]
    if active:
        raise ValueError(ALREADY_CACHED.format(" and ".join(active)))


def _as_image(sheet: Any) -> torch.Tensor:
    """A Pillow image as ComfyUI's IMAGE: (1, height, width, 3) in 0..1."""
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, sheet.height, sheet.width, 3) / 255
