"""Load Refrain Video Demo: ComfyUI samples 15 frames of its model, decodes them all, and reuses attention in them."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image

from cache_core.demo import wan
from cache_core.demo.motion import MOTIONS, PATTERNS, SHAPES, Clip, prompt_of, random_clip, render
from cache_core.demo.server import PACK
from cache_core.demo.workflows import node_id, set_inputs, workflow

CACHE = "RefrainPyramidAttentionBroadcast"
OFF = {f"{kind}_attention_block_skip_range": 1 for kind in ("spatial", "temporal", "cross")}


@pytest.fixture(params=["server", "oldest"])
def any_server(request):
    return request.getfixturevalue(request.param)


def with_frames(**changes):
    """The workflow as it is, and a picture of each frame as it was decoded; some settings of the cache are others."""
    prompt = set_inputs(workflow("video"), CACHE, **changes)
    prompt["frames"] = {"class_type": "PreviewImage", "inputs": {"images": [node_id(prompt, "VAEDecode"), 0]}}
    return prompt


def without_cache():
    """The same with the cache node left out."""
    prompt = with_frames()
    source = prompt.pop(node_id(prompt, CACHE))["inputs"]["model"]
    return set_inputs(prompt, "KSampler", model=source)


def frames_in(entry, server):
    """The bytes of each frame's pixels."""
    pictures = [Image.open(io.BytesIO(server.picture(image))) for image in entry["outputs"]["frames"]["images"]]
    assert {picture.size for picture in pictures} == {(wan.SIZE, wan.SIZE)}
    return [picture.convert("RGB").tobytes() for picture in pictures]


def report_in(entry):
    (report,) = [shown for output in entry["outputs"].values() for shown in output.get("refrain_report", [])]
    return report


def test_the_workflow_samples_and_saves_a_video_of_fifteen_frames_with_reuse(any_server):
    entry = any_server.run(with_frames())
    frames = frames_in(entry, any_server)
    calls = report_in(entry)["calls"]

    assert len(frames) == wan.FRAMES == len(set(frames))
    (saved,) = entry["outputs"][node_id(workflow("video"), "SaveVideo")]["images"]
    assert saved["filename"].endswith(".mp4") and any_server.picture(saved)[4:8] == b"ftyp"
    reused = [call["step"] for call in calls if call["computed_share"] < 1]
    assert len(calls) == 20 and len(reused) >= 7 and not {*reused} & {0, 1, 2, 19}
    assert report_in(entry)["totals"]["computed_share"] < 0.75


def test_off_is_the_uncached_video_bit_for_bit_and_on_is_not(server):
    uncached = frames_in(server.run(without_cache()), server)
    off = server.run(with_frames(**OFF))

    assert frames_in(off, server) == uncached
    assert report_in(off)["totals"]["computed_share"] == 1
    assert not {*frames_in(server.run(with_frames()), server)} & {*uncached}


def test_the_stock_latent_of_length_57_has_the_frames_that_it_was_trained_for(comfy):
    from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo

    prompt = workflow("video")
    given = prompt[node_id(prompt, "EmptyHunyuanLatentVideo")]["inputs"]
    latent = EmptyHunyuanLatentVideo.execute(**given).args[0]["samples"]
    assert latent.shape == wan.noise(0, wan.FRAMES, wan.SIZE).shape


@pytest.fixture(scope="module")
def vae(comfy):
    from cache_core.adapters.comfyui.demo import load_video_vae

    return load_video_vae()


@pytest.fixture(scope="module")
def clean(comfy):
    """Latents of two rendered videos, as they are outside the model."""
    import torch
    from comfy.latent_formats import Wan21

    chance = random.Random(0)
    clips = [random_clip(chance) for _ in range(2)]
    return Wan21().process_out(wan.encode(render(clips, 4, wan.SIZE, torch.Generator().manual_seed(0))))


def test_each_frame_is_decoded_as_the_reference_decodes_it(vae, clean):
    from comfy.latent_formats import Wan21

    from cache_core.compare.quality import psnr

    videos, reference = vae.decode(clean), wan.decode(Wan21().process_in(clean))

    assert videos.shape == (2, 4, wan.SIZE, wan.SIZE, 3)
    pairs = zip(videos.flatten(0, 1).movedim(-1, 1), reference.flatten(0, 1), strict=True)
    assert all(psnr(*pair) > 28 for pair in pairs)


def test_each_frame_is_the_picture_that_the_stock_vae_makes_of_it(vae, clean):
    import torch

    from cache_core.adapters.comfyui.demo import load_vae

    stock, videos = load_vae(), vae.decode(clean)
    assert stock.decode(clean).shape == (2, wan.SIZE, wan.SIZE, 3)  # the first frames, and no other
    for frame in range(clean.shape[2]):
        torch.testing.assert_close(videos[:, frame], stock.decode(clean[:, :, frame]))
        torch.testing.assert_close(vae.decode(clean[:, :, frame]), stock.decode(clean[:, :, frame]))


def test_tiles_are_decoded_frame_by_frame_too(vae, clean):
    import torch

    torch.testing.assert_close(vae.decode_tiled(clean), vae.decode(clean))  # one tile holds a frame


def test_frames_are_encoded_into_one_video_and_videos_into_as_many(vae, clean):
    import torch

    from cache_core.adapters.comfyui.demo import load_vae

    with torch.inference_mode():  # as nodes run: ComfyUI's encoder in tiles needs it
        videos, stock = vae.decode(clean), load_vae()
        for encode in (vae.encode, vae.encode_tiled):
            latents = encode(videos)
            assert latents.shape == clean.shape
            torch.testing.assert_close(encode(videos[1]), latents[1:])
        torch.testing.assert_close(vae.encode(videos)[0, :, 2], stock.encode(videos[0])[2])


def test_the_node_and_its_page_say_what_it_was_trained_for(server):
    info = server.get("/object_info/RefrainLoadVideoDemo")["RefrainLoadVideoDemo"]
    page = (PACK / "web" / "docs" / "RefrainLoadVideoDemo" / "en.md").read_text(encoding="utf-8")

    for text in (info["description"], page):
        assert f"{wan.FRAMES} frames of {wan.SIZE} x {wan.SIZE} pixels" in text
    known = {*SHAPES, *PATTERNS, *" ".join(MOTIONS).replace("*", "").split()}
    assert not [word for word in known if word not in page]


def test_the_workflows_prompt_is_one_that_it_was_trained_with():
    prompt = workflow("video")
    positive = prompt[prompt[node_id(prompt, "KSampler")]["inputs"]["positive"][0]]["inputs"]["text"]
    clip = Clip("red", "star", "top", "moving * to the left", "slowly", "blue", "striped")
    assert positive == prompt_of(clip)
