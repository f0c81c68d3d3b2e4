"""Load Refrain Demo: a small trained model to try the caches on, with nothing to download."""

from __future__ import annotations

from comfy_api.latest import io

from ..cache_core.adapters.comfyui.demo import load_clip, load_model, load_vae
from .compat import schema


class LoadDemo(io.ComfyNode):
    """The embedded demo as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefrainLoadDemo",
            display_name="Load Refrain Demo",
            description="A tiny trained Flux that comes with this pack: 64 x 64 pictures of one shape on a background, "
            'such as "a big red ball at the center on a blue striped background". It runs on any machine.',
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A Flux of 9 million parameters."),
                io.Clip.Output(
                    display_name="clip", tooltip="Its text encoder. It knows a few words; others change little."
                ),
                io.Vae.Output(display_name="vae", tooltip="Its VAE."),
            ],
            search_aliases=["demo", "example", "Refrain"],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_model(), load_clip(), load_vae())
