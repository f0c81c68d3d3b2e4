"""Compare Cache Settings: one seed uncached, with caches, and with the fewer steps that take the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui

from ..cache_core.adapters.comfyui.sampling import SamplerInputs
from ..cache_core.compare.layouts import against_fewer_steps
from ..cache_core.compare.side_by_side import rows, table
from ..cache_core.strategy.setting import counted
from .comparing import Comparison
from .compat import schema
from .inputs import check_inputs
from .sampler_inputs import as_image, refuse_a_cache, sampler_inputs

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
                *sampler_inputs(),
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
        picture = as_image(against_fewer_steps(compared, title, measured))
        text = f"{table(compared.runs)}\n{measured}"
        shown = {"refrain_comparison": [{"rows": rows(compared.runs), "measured": measured}], "text": [text]}
        images = compared.pictures.movedim(1, -1).contiguous()
        preview = getattr(ui, "PreviewImage", None)  # a ComfyUI may call it otherwise; the outputs have it all
        drawn = preview(picture, cls=cls).as_dict() if preview else {}
        return io.NodeOutput(picture, text, images, ui={**drawn, **shown})


def _check(model: Any, models: Sequence[Any]) -> None:
    if not models:
        raise ValueError(NOTHING_TO_COMPARE)
    refuse_a_cache(model, ALREADY_CACHED)
