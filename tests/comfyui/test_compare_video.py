"""Compare Cache Settings on a video, in process: a tiny Wan, and a VAE that makes frames of its latents."""

from __future__ import annotations

import gc
import importlib
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, _register

from cache_core.compare.quality import psnr, ssim

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
def comparison(pack, wan, vae):
    """The video sampled with TaylorSeer, and side by side without: before it runs."""
    draw = torch.Generator().manual_seed(1)
    positive, negative = ([[prompt, {}]] for prompt in torch.randn(2, 1, 12, 32, generator=draw))
    latent = {"samples": torch.zeros(LATENT)}
    sampling = pack("cache_core.adapters.comfyui.sampling")
    inputs = sampling.SamplerInputs(1, 3.0, "euler", "simple", positive, negative, latent)
    made, with_caches = pack("nodes.comparing").Comparison, pack("nodes.settings_node").with_caches

    def compared(by=vae, models=1, interval=3):
        strategy = pack("cache_core.strategies.taylorseer").TaylorSeerCache(cache_interval=interval)
        return made(wan, [with_caches(wan, [strategy], node_id=1)] * models, STEPS, inputs, by)

    return compared


@pytest.fixture(scope="module")
def decoded(pack, vae):
    """What the VAE made, of each sampling run in turn; and the comparison of these."""
    return []


@pytest.fixture(scope="module")
def compared(comparison, vae, decoded):
    def decode(latent):
        decoded.append(vae.decode(latent))
        return decoded[-1]

    made = comparison(SimpleNamespace(decode=decode))
    return made.run(), made.of_how_many


def test_all_frames_count_as_if_they_had_been_kept_and_the_middle_one_is_shown(compared, decoded):
    (uncached, (cached,)), (before, after) = (compared[0].uncached, compared[0].cached), decoded[:2]
    before, after = before[0].movedim(-1, 1), after[0].movedim(-1, 1)

    assert cached.computed_share < 0.8
    assert uncached.pictures.equal(before[FRAMES // 2][None]) and cached.pictures.equal(after[FRAMES // 2][None])
    assert (cached.psnr, cached.ssim) == pytest.approx((psnr(after, before), ssim(after, before)), rel=1e-9)
    by_frame = {psnr(*frames) for frames in zip(after, before)}
    assert len(by_frame) == FRAMES
    assert min(by_frame) < cached.psnr < max(by_frame)


def test_the_sheet_shows_the_middle_frame_enlarged(compared):
    from cache_core.compare.layouts import against_fewer_steps
    from cache_core.compare.sheet import to_image

    sheet = against_fewer_steps(compared[0], "title")
    middle = to_image(compared[0].uncached.pictures[0]).resize((256, 256), 3)
    left = 32 + 494 + 12  # margin, words, gap
    row = next(y for y in range(sheet.height) if sheet.getpixel((left + 1, y)) == middle.getpixel((1, 0)))
    assert sheet.crop((left, row, left + 256, row + 256)).tobytes() == middle.tobytes()


def test_it_says_how_many_frames_there_are(compared):
    assert compared[1] == f", of all {FRAMES} frames; the middle one is shown"


LONG, SIZE = 48, 96  # frames, pixels
VIDEO, FRAME = LONG * SIZE * SIZE * 3 * 4, SIZE * SIZE * 3 * 4  # bytes


def held():
    """Bytes of all pictures that are somewhere in this process: tensors of at least a frame."""
    gc.collect()
    stores = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device.type == "cpu":
            store = thing.untyped_storage()
            if store.nbytes() in (VIDEO, FRAME):
                stores[store.data_ptr()] = store.nbytes()
    return sum(stores.values())


def test_of_a_long_video_two_runs_are_held_at_most_and_then_one_frame_of_each(comparison):
    seen = []

    def decode(latent):
        seen.append(held() - before)  # and as much as one video comes now
        still = latent[:, :3, :1].movedim(1, -1).mean(dim=(2, 3), keepdim=True)
        return torch.sigmoid(still + torch.linspace(-1, 1, SIZE)[:, None, None]).expand(1, LONG, SIZE, SIZE, 3).clone()

    before = held()
    compared = comparison(SimpleNamespace(decode=decode), models=3).run()

    assert len(seen) >= 5  # the uncached run, three with caches, and one of fewer steps
    assert max(seen) <= VIDEO + len(seen) * FRAME
    assert compared.pictures.shape == (len(compared.runs), 3, SIZE, SIZE)
    assert held() - before <= (len(seen) + 1) * FRAME


@pytest.fixture
def timed(pack, monkeypatch):
    """Sampling runs that take a second for each step, a cached run a share of that; each times what a clock gives."""
    sampling = pack("cache_core.adapters.comfyui.sampling")
    strategies_of = pack("cache_core.adapters.comfyui").strategies_of

    def by(share, jitter):
        steps, jitter = [], iter(jitter)
        sampled = sampling.Rounds.run

        def run(rounds, model, count):
            is_cached = bool(strategies_of(model))
            steps.append(f"{count} cached" if is_cached else str(count))
            return sampled(rounds, model, count)._replace(seconds=count * (share if is_cached else 1) * next(jitter))

        monkeypatch.setattr(sampling.Rounds, "run", run)
        return steps

    return by


def test_a_clear_verdict_takes_one_round(comparison, timed):
    ran = timed(0.2, itertools.repeat(1.0))
    compared = comparison().run()

    (cached,), (twin,) = compared.cached, compared.twins
    assert ran == ["12", "12 cached", "3"]  # 3: the most steps that a fifth of the time may buy
    assert cached.verdict.outcome == "worth it" and "Closer than 3 steps" in cached.verdict.text
    assert cached.psnr > twin.psnr
    assert (twin.steps, twin.settings) == (3, "instead of TaylorSeer Cache")


def test_where_the_clock_decides_there_are_three_rounds_and_it_says_so(comparison, timed):
    ran = timed(0.8, itertools.cycle([1.0, 1.0, 1.3]))
    compared = comparison().run()

    assert ran.count("12") == ran.count("12 cached") == 3
    assert compared.cached[0].verdict.outcome == "too close"
    assert "the clock's noise is larger" in compared.cached[0].verdict.text


def test_a_cache_that_takes_longer_is_no_faster_and_has_no_twin(comparison, timed):
    ran = timed(1.3, itertools.repeat(1.0))
    compared = comparison().run()

    assert ran == ["12", "12 cached"] * 2  # twice: one run may have been held up
    assert (compared.cached[0].verdict.outcome, compared.twins) == ("no faster", [None])


def test_a_cache_that_its_time_in_steps_would_beat_is_no_better(comparison, timed):
    timed(0.9, itertools.repeat(1.0))
    compared = comparison(interval=12).run()

    (cached,), (twin,) = compared.cached, compared.twins
    assert cached.verdict.outcome == "no better" and f"No better than {twin.steps} steps" in cached.verdict.text
    assert cached.psnr <= twin.psnr


def test_the_strips_run_shows_the_sheets_speed_up(pack, comparison, timed):
    timed(0.25, itertools.repeat(1.0))
    made = comparison()
    compared = made.run()

    assert compared.cached[0].speed_up(compared.uncached) == pytest.approx(4)
    assert len(made.cached[0].shown) >= 1
    for shown in made.cached[0].shown:
        assert shown.report["totals"]["speed_up"] == shown.as_dict()["report"]["totals"]["speed_up"] == pytest.approx(4)


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


def test_every_step_of_every_run_shows_a_preview_and_moves_the_bar(comfy, comparison, timed, monkeypatch):
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod

    seen = []
    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: seen.append((value, total, preview))
    )
    ran = timed(0.2, itertools.repeat(1.0))
    comparison().run()

    steps = sum(int(run.split()[0]) for run in ran) + 2  # one before each phase loads the model
    assert len(seen) == steps + 1
    values = [value for value, _, _ in seen]
    assert values == sorted(values) and len(set(values[: STEPS * 2])) == STEPS * 2
    assert seen[-1][0] == seen[-1][1]
    assert {preview[0] for _, _, preview in seen if preview} == {"JPEG"}
    assert sum(preview is not None for _, _, preview in seen) == steps
