"""Compare Cache Settings on a video, in process: a tiny Wan, and a VAE that makes frames of its latents."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, _register

from cache_core.compare.quality import psnr

FRAMES, STEPS = 5, 12
LATENT = (1, 16, FRAMES, 8, 8)


@pytest.fixture(scope="module")
def pack(comfy):
    """Our nodes' modules in this process, by name."""
    if "refrain_pack" not in sys.modules:
        _register("refrain_pack", ROOT)
    return lambda name: importlib.import_module(f"refrain_pack.{name}")


@pytest.fixture(scope="module")
def wan(comfy):
    """A Wan of four blocks in ComfyUI's own classes, filled with random numbers."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.WAN21_T2V(
        dict(
            image_model="wan2.1", model_type="t2v", patch_size=(1, 2, 2), freq_dim=32, window_size=(-1, -1),
            qk_norm=True, cross_attn_norm=True, eps=1e-6, in_dim=16, out_dim=16, dim=64, ffn_dim=128, num_heads=4,
            num_layers=4, text_dim=32,
        )
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.normal_(0, scale, generator=generator)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


@pytest.fixture(scope="module")
def vae():
    """Frames of 16 by 16 pixels out of the first three channels."""

    def decode(latent):
        frames = latent[:, :3].movedim(1, -1).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return torch.sigmoid(frames)  # (videos, frames, height, width, channels)

    return SimpleNamespace(decode=decode)


@pytest.fixture(scope="module")
def compare(pack, wan, vae):
    """Sample the video with TaylorSeer and side by side without."""
    draw = torch.Generator().manual_seed(1)
    positive, negative = ([[prompt, {}]] for prompt in torch.randn(2, 1, 12, 32, generator=draw))
    latent = {"samples": torch.zeros(LATENT)}
    sampling = pack("cache_core.adapters.comfyui.sampling")
    inputs = sampling.SamplerInputs(1, 3.0, "euler", "simple", positive, negative, latent)
    strategy = pack("cache_core.strategies.taylorseer").TaylorSeerCache(cache_interval=3)
    cached = pack("nodes.settings_node").with_caches(wan, [strategy], node_id=1)
    return lambda: pack("nodes.compare_node")._compare(wan, [cached], STEPS, inputs, vae)


@pytest.fixture(scope="module")
def compared(compare):
    return compare()


def test_all_frames_count_and_the_middle_one_is_shown(compared):
    uncached, (cached,) = compared.uncached, compared.cached

    assert uncached.pictures.shape == cached.pictures.shape == (FRAMES, 3, 16, 16)
    assert compared.shown == FRAMES // 2
    assert cached.computed_share < 0.8
    assert cached.psnr == psnr(cached.pictures, uncached.pictures)
    by_frame = {psnr(*frames) for frames in zip(cached.pictures, uncached.pictures)}
    assert len(by_frame) == FRAMES
    assert min(by_frame) < cached.psnr < max(by_frame)


def test_the_sheet_shows_the_middle_frame_enlarged(compared):
    from cache_core.compare.layouts import in_columns
    from cache_core.compare.sheet import to_image

    sheet = in_columns(compared, "title")
    middle = to_image(compared.uncached.pictures[FRAMES // 2]).resize((256, 256), 3)
    row = next(y for y in range(sheet.height) if sheet.getpixel((33, y)) == middle.getpixel((1, 0)))
    assert sheet.crop((32, row, 32 + 256, row + 256)).tobytes() == middle.tobytes()


def test_it_says_how_many_frames_there_are(pack):
    words = pack("nodes.compare_node")._of_how_many
    assert words(FRAMES, True) == f", of all {FRAMES} frames; the middle one is shown"
    assert words(1, False) == ""


def test_sound_is_refused(pack):
    sampling = pack("cache_core.adapters.comfyui.sampling")
    sound = SimpleNamespace(decode=lambda latent: torch.zeros(1, 2, 48000))
    with pytest.raises(ValueError, match="makes no pictures of these latents"):
        sampling.decoded(sound, torch.zeros(1, 8, 32))


def test_one_frame_of_a_video_model_is_a_picture(pack):
    is_video = pack("cache_core.adapters.comfyui.sampling").is_video
    assert is_video(torch.zeros(LATENT))
    assert not is_video(torch.zeros(1, 16, 1, 8, 8))
    assert not is_video(torch.zeros(1, 16, 8, 8))


def test_every_step_of_every_run_shows_a_preview_and_moves_the_bar(comfy, compare, monkeypatch):
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod

    seen = []
    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: seen.append((value, total, preview))
    )
    compared = compare()

    twins = sum(twin.steps for twin in compared.twins if twin)
    assert [value for value, _, _ in seen] == list(range(1, 1 + 2 * STEPS + twins + 1))  # one step loads the model
    assert seen[-1][1] == 1 + 2 * STEPS + twins
    assert {preview[0] for _, _, preview in seen} == {"JPEG"}
