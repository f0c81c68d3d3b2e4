"""Load Refrain Demo, Load Refrain Video Demo: small trained models to try the caches on, with nothing to download."""

from __future__ import annotations

from comfy_api.latest import io

from ..cache_core.adapters.comfyui.demo import load_clip, load_model, load_vae, load_video_model, load_video_vae
from .compat import schema

FEW_WORDS = "Its text encoder. It knows a few words; others change little."


class LoadDemo(io.ComfyNode):
    """The embedded demo of pictures as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefrainLoadDemo",
            display_name="Load Refrain Demo",
            description="A tiny trained Flux that comes with this pack: 128 x 128 pictures of one or two shapes on a "
            'background, such as "a red ball at the left and a yellow star at the right on a blue tiled background". '
            "It runs on any machine.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A Flux of 9 million parameters."),
                io.Clip.Output(display_name="clip", tooltip=FEW_WORDS),
                io.Vae.Output(display_name="vae", tooltip="Its VAE."),
            ],
            search_aliases=["demo", "example", "Refrain"],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_model(), load_clip(), load_vae())


class LoadVideoDemo(io.ComfyNode):
    """The embedded demo of videos as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefrainLoadVideoDemo",
            display_name="Load Refrain Video Demo",
            description="A tiny trained Wan that comes with this pack: videos of 15 frames of 96 x 96 pixels, of one "
            "object that moves, turns or grows, such as "
            '"a red star at the top moving slowly to the left on a blue striped background". It runs on any machine.',
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A Wan of about 8 million parameters."),
                io.Clip.Output(display_name="clip", tooltip=FEW_WORDS),
                io.Vae.Output(display_name="vae", tooltip="Its VAE, which decodes every frame."),
            ],
            search_aliases=["demo", "example", "Refrain", "video", "text to video", "Wan"],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_video_model(), load_clip(), load_video_vae())
