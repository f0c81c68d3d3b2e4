"""Find Cache Settings: a wish in, a cached model out, found on the user's own model and prompt in a dozen runs."""

from __future__ import annotations

from datetime import date
from typing import Any

from comfy_api.latest import io, ui

from ..cache_core.adapters.comfyui import strategies_of
from ..cache_core.adapters.comfyui.identity import device_of, identity_of
from ..cache_core.adapters.comfyui.sampling import SamplerInputs
from ..cache_core.compare.finding import MOST_RUNS
from ..cache_core.compare.found import CLOSENESS, WISHES, Found, Wish
from ..cache_core.compare.layouts import against_fewer_steps
from ..cache_core.compare.plot import plot
from ..cache_core.compare.side_by_side import rows, table
from ..cache_core.measured import entry_for
from ..cache_core.measured_text import as_text
from ..cache_core.strategy.setting import counted
from . import measured_file
from .compat import SPEED_WORDS, own_id, schema
from .finding import Finding
from .inputs import check_inputs
from .sampler_inputs import as_image, refuse_a_cache, sampler_inputs
from .settings_node import settings_output, with_caches

ALREADY_CACHED = (
    "The model samples with {}, so there would be no uncached picture to compare with. Connect the model as it is "
    "before the cache node to the input model."
)
SEED = (
    "The noise of the search; what it finds is judged on the next seed. Higher or lower only gives another picture. "
    "Usual: 0 or any."
)
WISH = (
    "What the cache should do. How close to the uncached picture, as fast as that can be: 'can't see it' is {:g} dB, "
    "'hardly' {:g} dB, 'draft' {:g} dB. Or 'speed-up': as fast as the input speedup says, as close as that can be. "
    "Usual: 'hardly'."
).format(*CLOSENESS.values())
SPEEDUP = (
    "Higher is faster and less faithful. With the wish 'speed-up': how many times as fast as without a cache the "
    "sampling should be. Usual: 1.5 to 2."
)
ENTRY = "What is kept of it for Faster Sampling, as JSON to share. Empty where there is nothing to keep."
MEASURED = "Seed {}, which was not searched on. Seconds are of sampling alone, and waver; what was computed does not."


class FindSettings(io.ComfyNode):
    """Searches the user's own model for the cache that does what was wished for, and says how good it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefrainFindSettings",
            display_name="Find Cache Settings",
            description="Makes sampling faster. Searches, on your model and prompt, for the cache and settings that do "
            "what you wish for. Samples one seed with several, judges the best on another seed, and hands on the model "
            f"with it, if it is closer than fewer steps at the same cost. It takes at most {MOST_RUNS} sampling runs.",
            inputs=[
                io.Model.Input("model", tooltip="The model without a cache, after LoRAs and other patches."),
                io.Combo.Input("wish", options=list(WISHES), default="hardly", tooltip=WISH),
                io.Float.Input("speedup", default=1.5, min=1.2, max=5.0, step=0.1, round=0.01, tooltip=SPEEDUP),
                *sampler_inputs(SEED, another_seed=False),  # with another, the next prompt would search again
                io.Vae.Input("vae", tooltip="The VAE that turns the samples into pictures."),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The same model, sampling with the cache that was found."
                ),
                settings_output(),
                io.Image.Output(display_name="sheet", tooltip="What was found, beside uncached and fewer steps."),
                io.Image.Output(display_name="plot", tooltip="Each run: how close it was, and what it computed."),
                io.String.Output(display_name="found", tooltip="What was found and how good it is, in a sentence."),
                io.String.Output(display_name="entry", tooltip=ENTRY),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # or two nodes with the same inputs would share one id
            is_output_node=True,
            has_intermediate_output=True,  # what it says is sent again where its result is taken over
            search_aliases=[*SPEED_WORDS, "find settings", "auto tune", "calibrate", "optimal", "cache", "Refrain"],
        )

    @classmethod
    def execute(cls, model: Any, wish: str, speedup: float, steps: int, vae: Any, **inputs: Any) -> io.NodeOutput:
        check_inputs(cls, model=model, wish=wish, speedup=speedup, steps=steps, vae=vae, **inputs)
        refuse_a_cache(model, ALREADY_CACHED)
        sampler = SamplerInputs(**inputs)
        finding = Finding(model, steps, sampler, vae)
        found = finding.run(Wish(wish, speedup))
        cached = with_caches(model, [found.strategy] if found.strategy else [], own_id(cls), steps)
        entry = _kept(model, found, sampler)
        method = f"{counted(steps, 'step')}, {sampler.sampler_name}, {sampler.scheduler}, cfg {sampler.cfg:g}"
        compared = finding.side_by_side(found)
        measured = MEASURED.format(finding.seeds[found.uncached.seed]) if found.judged else ""
        sheet = as_image(against_fewer_steps(compared, method, measured))
        points = as_image(plot(found, f"{method}, seed {sampler.seed}"))
        shown = {"rows": rows(compared.runs), "table": table(compared.runs), "points": _points(found)}
        drawn = _previews(cls, sheet, points)
        return io.NodeOutput(
            cached, strategies_of(cached), sheet, points, found.told, entry,
            ui={**drawn, "text": [found.told], "refrain_found": [shown]},
        )  # fmt: skip


def _kept(model: Any, found: Found, sampler: SamplerInputs) -> str:
    """Keep what was found, for Faster Sampling, and its text. Of a part of the denoising nothing is kept."""
    if sampler.denoise != 1:
        return ""
    how = (sampler.sampler_name, sampler.scheduler, sampler.cfg)
    entry = entry_for(found, identity_of(model), *how, device_of(model), date.today())
    if entry is None:
        return ""
    measured_file.keep(entry)
    return as_text([entry])


def _points(found: Found) -> list[dict[str, Any]]:
    """Each run as JSON. Of a closeness that is no number there is none."""
    return [
        {
            "how": point.how if isinstance(point.how, int) else point.how.title,
            "seed": point.seed,
            "decibels": point.decibels if abs(point.decibels) < float("inf") else None,
            "computed_share": point.share,
            "seconds": point.seconds,
        }
        for point in found.points
    ]


def _previews(node: type[io.ComfyNode], *pictures: Any) -> dict[str, Any]:
    """Both pictures on the node, one after the other: they differ in size."""
    preview = getattr(ui, "PreviewImage", None)  # a ComfyUI may call it otherwise; the outputs have it all
    drawn = [preview(picture, cls=node).as_dict() for picture in pictures] if preview else []
    return {"images": [image for each in drawn for image in each["images"]]} if drawn else {}
