"""`python benchmarks/video_pictures.py`: frames for the video demo's help page, and its workflow's thumbnail."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy
import torch
from PIL import Image
from torch import Tensor

from cache_core.compare.sheet import Label, Sheet, draw, to_image
from cache_core.demo.server import PACK, Server
from cache_core.demo.workflows import node_id, set_inputs, workflow

PAGE = PACK / "web" / "docs" / "RefrainLoadVideoDemo" / "videos.jpg"
THUMBNAIL = PACK / "example_workflows" / "refrain_demo_video.jpg"
PROMPTS = (  # the first is the workflow's own
    "a red star at the top moving slowly to the left on a blue striped background",
    "a yellow heart at the center growing quickly on a purple plain background",
    "a green triangle at the left turning quickly to the right on a white checkered background",
)
IN_ROW, ON_CARD = (0, 3, 7, 11, 14), (0, 5, 9, 14)  # frames of the 15
CARD = 256  # pixels of a frame on it, in two rows of two


def main() -> None:
    """Write both."""
    with Server() as server:
        write(server)


def write(server: Server) -> None:
    """Both, made by this ComfyUI."""
    videos = [_frames(server, prompt) for prompt in PROMPTS]
    sheet(videos).save(PAGE, quality=85, optimize=True)
    thumbnail(videos[0]).save(THUMBNAIL, quality=90, optimize=True)


def sheet(videos: Sequence[Sequence[Tensor]]) -> Sheet:
    """Some frames of each video, beside its prompt."""
    rows = [[Label(settings=prompt), *(video[at] for at in IN_ROW)] for prompt, video in zip(PROMPTS, videos)]
    captions = [Label(settings="96 x 96, enlarged"), *(Label(settings=f"frame {at + 1}") for at in IN_ROW)]
    return draw("What it draws", [captions, *rows])


def thumbnail(video: Sequence[Tensor]) -> Image.Image:
    """Four frames, to be read as a page is."""
    card = Image.new("RGB", (2 * CARD, 2 * CARD))
    for place, at in enumerate(ON_CARD):
        frame = to_image(video[at]).resize((CARD, CARD), Image.Resampling.BICUBIC)
        card.paste(frame, (place % 2 * CARD, place // 2 * CARD))
    return card


def opened(server: Server, image: dict[str, str]) -> Tensor:
    """A picture (3, height, width) in 0..1 behind an image of the history's outputs."""
    pixels = numpy.asarray(Image.open(io.BytesIO(server.picture(image))).convert("RGB"), dtype=numpy.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)


def _frames(server: Server, prompt: str) -> list[Tensor]:
    """The workflow's frames as they were decoded, without its cache."""
    graph = workflow("video")
    positive = graph[node_id(graph, "KSampler")]["inputs"]["positive"][0]
    graph[positive]["inputs"]["text"] = prompt
    cache = graph.pop(node_id(graph, "RefrainPyramidAttentionBroadcast"))
    graph = set_inputs(graph, "KSampler", model=cache["inputs"]["model"])
    for kind in ("ImageScale", "CreateVideo", "SaveVideo"):
        del graph[node_id(graph, kind)]
    graph["frames"] = {"class_type": "PreviewImage", "inputs": {"images": [node_id(graph, "VAEDecode"), 0]}}
    return [opened(server, image) for image in server.run(graph)["outputs"]["frames"]["images"]]


if __name__ == "__main__":
    main()
