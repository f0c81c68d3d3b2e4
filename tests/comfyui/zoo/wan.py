"""Wan and its relatives: one stream of tokens, and what is led into it between the blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch import Tensor, nn

from .additions import patched
from .architecture import TEXT, Architecture, Draw
from .prompts import normal, reference, text
from .replacing import replaced_blocks

WAN = dict(
    image_model="wan2.1", model_type="t2v", patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True,
    cross_attn_norm=True, eps=1e-6, in_dim=16, out_dim=16, dim=128, ffn_dim=256, num_heads=1, num_layers=4,
    text_dim=4096,
)  # fmt: skip
LATENT = (1, 16, 3, 16, 16)
VACE = WAN | dict(model_type="vace", num_layers=6, vace_layers=3, vace_in_dim=96)
SPEECH = dict(audio_inject_layers=[0, 4])  # of 5 blocks: the last follows the last block, as in the real model
DANCE = dict(audio_inject_layers=[0, 3], music_dim=64, music_latent_dim=64)


def _seen(draw: Draw) -> SimpleNamespace:
    return SimpleNamespace(penultimate_hidden_states=draw(1, 9, 1280))  # 257 tokens of CLIP's in real use


def _free_after_first(draw: Draw) -> Tensor:
    """A mask: the first frame is known."""
    mask = draw(1, 1, 3, 16, 16) * 0 + 1
    mask[:, :, 0] = 0
    return mask


def _first_frame(draw: Draw) -> dict[str, Any]:
    mask = _free_after_first(draw)
    return {"concat_latent_image": draw(*LATENT), "concat_mask": mask}


def _known_first_frame(draw: Draw) -> list:
    mask = _free_after_first(draw)
    return [[draw(1, TEXT, 4096), {"denoise_mask": mask}]]


def _i2v(draw: Draw) -> list:
    return [[draw(1, TEXT, 4096), {"clip_vision_output": _seen(draw), **_first_frame(draw)}]]


def _vace(draw: Draw, count: int = 1) -> list:
    frames = [draw(1, 32, 3, 16, 16) for _ in range(count)]
    masks = [draw(1, 64, 3, 16, 16).round() for _ in range(count)]
    return [[draw(1, TEXT, 4096), {"vace_frames": frames, "vace_mask": masks, "vace_strength": [1.0, 0.7][:count]}]]


def _camera(draw: Draw) -> list:
    start = {"concat_latent_image": draw(*LATENT), "clip_vision_output": _seen(draw)}
    return [[draw(1, TEXT, 4096), {**start, "camera_conditions": draw(1, 24, 3, 128, 128)}]]


def _voice(draw: Draw) -> list:
    extra = {"audio_embed": draw(1, 3, 8, 5, 16), "reference_latents": [draw(1, 16, 1, 16, 16)]}
    return [[draw(1, TEXT, 4096), extra]]


def _animate(draw: Draw) -> list:
    ((context, extra),) = _i2v(draw)
    return [[context, {**extra, "pose_video_latent": draw(1, 16, 2, 16, 16), "face_video_pixels": draw(1, 3, 1, 4, 4)}]]


def _animate_2(draw: Draw) -> list:
    ((context, extra),) = _i2v(draw)
    pose = Draw(5)  # one for both prompts
    led = {"pose_video_latent": pose(1, 16, 2, 16, 16), "cross_attn_pose": pose(1, TEXT, 4096)}
    return [[context, {**extra, **led, "clip_vision_output_pose": _seen(pose)}]]


def _scail(draw: Draw) -> list:
    extra = {"reference_latents": [draw(1, 16, 1, 16, 16)], "pose_video_latent": draw(1, 16, 3, 8, 8)}
    return [[draw(1, TEXT, 4096), {**extra, "clip_vision_output": _seen(draw)}]]


def _dance(draw: Draw) -> list:
    ((context, extra),) = _i2v(draw)
    music = {"audio_embed": draw(1, 20, 35), "fps": 30.0, "audio_inject_scale": 1.0}
    return [[context, {**extra, **music, "clip_vision_output_ref": _seen(draw)}]]


def _evenly_weighted(model: nn.Module) -> None:
    """The sound's layers are weighted by shares of their sum, which is near 0 for random weights."""
    model.casual_audio_encoder.weights.data.fill_(1)


@contextmanager
def _small_audio_projection() -> Iterator[None]:
    import comfy.ldm.wan.model as wan

    own = wan.AudioProjModel
    with mock.patch.object(
        wan, "AudioProjModel", lambda **sizes: own(**sizes | dict(channels=16, intermediate_dim=32))
    ):
        yield


@contextmanager
def _small_face_encoder() -> Iterator[None]:
    """It takes faces of 4 pixels instead of 512: its layers do not halve them, nor look at neighbours."""
    import comfy.ldm.wan.model_animate as animate

    own = animate.FaceEncoder
    with (
        mock.patch.object(animate, "ResBlock", partial(animate.ConvLayer, kernel_size=1)),
        mock.patch.object(animate, "FaceEncoder", lambda **sizes: own(**sizes | dict(num_heads=1))),
    ):
        yield


def frame_by_frame(patcher: Any) -> Any:
    """The sampler of autoregressive models: it keeps keys and values of the frames before, and has no guidance."""
    from comfy.patcher_extension import WrappersMP
    from comfy.samplers import ksampler

    def sample(executor: Any, noise: Any, latent: Any, sampler: Any, *args: Any, **kwargs: Any) -> Any:
        executor.class_obj.set_cfg(1.0)
        return executor(noise, latent, ksampler("ar_video", {"num_frame_per_block": 1}), *args, **kwargs)

    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "zoo frame by frame", sample)
    return clone


def _metadata(**transformer: Any) -> dict[str, str]:
    return {"config": json.dumps({"transformer": transformer})}


PATCHES = {"double_block": patched("double_block"), "replaced blocks": replaced_blocks(4)}

_wan = partial(
    Architecture,
    covers="wan/model.py",
    latent=LATENT,
    chains=("blocks",),
    attention=("spatial", "cross"),
    is_detected=True,
)

ARCHITECTURES = [
    _wan(
        name="Wan 2.1 t2v",
        config="WAN21_T2V",
        unet=WAN,
        prompt=text(4096),
        additions=PATCHES,
    ),
    _wan(
        name="Wan 2.1 i2v",
        config="WAN21_I2V",
        unet=WAN | dict(model_type="i2v", in_dim=36),
        prompt=_i2v,
        additions=PATCHES,
    ),
    _wan(
        name="Wan 2.2 5B",
        config="WAN22_T2V",
        unet=WAN | dict(in_dim=48, out_dim=48),
        latent=(1, 48, 3, 16, 16),
        prompt=text(4096),
    ),
    _wan(
        name="Wan 2.2 5B i2v",
        config="WAN22_T2V",
        unet=WAN | dict(in_dim=48, out_dim=48),
        latent=(1, 48, 3, 16, 16),
        prompt=_known_first_frame,
    ),
    _wan(
        name="Wan 2.1 VACE",
        config="WAN21_Vace",
        unet=VACE,
        prompt=_vace,
        chains=("blocks", "vace_blocks"),
        additions={"double_block": patched("double_block"), "replaced blocks": replaced_blocks(6)},
    ),
    _wan(
        name="Wan 2.1 VACE, two contexts",
        config="WAN21_Vace",
        unet=VACE,
        prompt=partial(_vace, count=2),
        live=("vace_blocks",),
        note="With several VACE contexts the VACE blocks always run.",
    ),
    _wan(
        name="Wan 2.1 Fun Camera",
        config="WAN21_Camera",
        unet=WAN | dict(model_type="camera", in_dim=32),
        prompt=_camera,
    ),
    _wan(
        name="Wan 2.2 S2V",
        config="WAN22_S2V",
        unet=WAN | SPEECH | dict(model_type="s2v", num_layers=5, ffn_dim=512),
        prompt=text(4096, audio_embed=normal(1, 25, 1024, 12), reference_latents=reference(1, 16, 1, 16, 16)),
        live=("audio_injector.injector",),
        metadata=_metadata(**SPEECH),
        prepare=_evenly_weighted,
    ),
    _wan(
        name="Wan 2.1 HuMo",
        config="WAN21_HuMo",
        unet=WAN | dict(model_type="humo", in_dim=36),
        prompt=_voice,
        shrunk=_small_audio_projection,
    ),
    _wan(
        name="Wan 2.2 Animate",
        covers="wan/model_animate.py",
        config="WAN22_Animate",
        unet=WAN | dict(model_type="animate", in_dim=36, num_layers=10),
        prompt=_animate,
        live=("face_adapter.fuser_blocks",),
        shrunk=_small_face_encoder,
    ),
    _wan(
        name="Wan-Animate 2",
        covers="wan/model_animate2.py",
        config="WAN_Animate2",
        unet=WAN | dict(model_type="animate2", in_dim=36),
        prompt=_animate_2,
        metadata=_metadata(model_type="animate2"),
        note="The pose video's branch always runs; ComfyUI's own Wan Animate 2 cache node stores it.",
        additions=PATCHES,
    ),
    _wan(
        name="SCAIL",
        config="WAN21_SCAIL",
        unet=WAN | dict(model_type="scail", in_dim=20),
        prompt=_scail,
    ),
    _wan(
        name="Wan-Dancer",
        covers="wan/model_wandancer.py",
        config="WAN22_WanDancer",
        unet=WAN | DANCE | dict(model_type="wandancer", in_dim=36, num_layers=8),
        prompt=_dance,
        live=("music_encoder", "music_injector.injector"),
        metadata=_metadata(**DANCE),
    ),
    _wan(
        name="Causal Wan",
        covers="wan/ar_model.py",
        config="WAN21_CausalAR_T2V",
        unet=WAN | dict(num_layers=6),
        prompt=text(4096),
        metadata=_metadata(causal_ar=True),
        note="With the autoregressive video sampler every step is computed.",
    ),
]
