"""Models of sound, and of shapes in space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from .architecture import TEXT, Architecture, Draw
from .prompts import normal, reference, text
from .replacing import replaced_blocks
from .weights import set_buffers, steady

ACE = dict(
    audio_model="ace", attention_head_dim=32, num_attention_heads=2, num_layers=8, in_channels=8, out_channels=8,
    max_height=16, max_width=512, max_position=512, mlp_ratio=2.5, patch_size=[16, 1], rope_theta=1000000.0,
    speaker_embedding_dim=512, text_embedding_dim=48, ssl_encoder_depths=[8, 8], ssl_latent_dims=[32, 32],
    ssl_names=["mert", "m-hubert"], lyric_encoder_vocab_size=64, lyric_hidden_size=32,
)  # fmt: skip
ACE_15 = dict(
    audio_model="ace1.5", hidden_size=64, text_hidden_dim=48, num_dit_layers=12, num_lyric_layers=4,
    num_timbre_layers=2, num_tokenizer_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=192,
    fsq_dim=64, encoder_hidden_size=64, encoder_intermediate_size=192, encoder_num_heads=4,
)  # fmt: skip
STABLE_AUDIO = dict(
    audio_model="dit1.0", embed_dim=64, num_heads=2, depth=4, io_channels=64, project_cond_tokens=True,
    global_cond_dim=1536,
)  # fmt: skip
STABLE_AUDIO_3 = dict(
    audio_model="dit1.0", embed_dim=64, num_heads=2, depth=4, io_channels=256, project_cond_tokens=True,
    global_cond_dim=768, timestep_features_type="expo", num_memory_tokens=8, norm_type="rms_norm",
    attn_kwargs={"qk_norm": "rms", "differential": True}, local_add_cond_dim=257, global_cond_shared_embed=True,
    global_cond_type="adaLN",
)  # fmt: skip
HUNYUAN = dict(
    image_model="hunyuan3d2_1", in_channels=64, context_dim=1024, hidden_size=64, mlp_ratio=4.0, num_heads=16, depth=9,
    qkv_bias=False, guidance_cond_proj_dim=None,
)  # fmt: skip
TRELLIS = dict(
    image_model="trellis2", resolution=32, model_channels=32, cond_channels=48, num_blocks=4, num_heads=1,
    mlp_ratio=2.0,
)  # fmt: skip
TRIPOSPLAT = dict(
    image_model="triposplat", q_token_length=96, model_channels=64, cond_channels=48, num_blocks=24,
    num_refiner_blocks=2, num_head_channels=32,
)  # fmt: skip

VOXELS = 60
MUSIC_SIZES = {2048: 64, 2304: 128 + 128 + 64}  # MiniMax-Music3 has no arguments for its features: what they become


def _shape_prompt(draw: Draw) -> list:
    where = torch.arange(VOXELS)
    voxels = {
        "trellis2_coords": torch.stack([where * 0, where % 4, where // 4 % 4, where // 16], dim=1).int(),
        "trellis2_coord_counts": torch.tensor([VOXELS]),
        "trellis2_generation_mode": "shape_generation",
    }
    return [[draw(1, TEXT, 48), {"embeds": draw(1, TEXT, 48), **voxels}]]


def _seconds(*names: str, features: str) -> Any:
    """Weights of the embedders of a sound's length, which its checkpoint holds beside the model."""

    def beside(draw: Draw) -> dict[str, Tensor]:
        from comfy.ldm.audio.embedders import NumberConditioner

        kinds = {} if features == "learned" else {"fourier_features_type": features}
        weights = NumberConditioner(768, **kinds).state_dict()
        return {
            f"conditioner.conditioners.{name}.{key}": 0.1 * draw(*weight.shape)
            for name in names
            for key, weight in weights.items()
        }

    return beside


@contextmanager
def _short_lyrics() -> Iterator[None]:
    from comfy.ldm.ace import model as ace

    small = partial(ace.LyricEncoder, output_size=32, attention_heads=2, linear_units=64, num_blocks=2)
    with mock.patch.object(ace, "LyricEncoder", small):
        yield


@contextmanager
def _small_music() -> Iterator[None]:
    import comfy.ops

    dit = import_module("comfy.ldm.minimax_music.dit")  # older ComfyUIs have none
    music = import_module("comfy.supported_models").MiniMaxMusic3

    class Linear(comfy.ops.disable_weight_init.Linear):
        def __init__(self, inputs: int, outputs: int, **settings: Any) -> None:
            super().__init__(MUSIC_SIZES.get(inputs, inputs), MUSIC_SIZES.get(outputs, outputs), **settings)

    class Conv1d(comfy.ops.disable_weight_init.Conv1d):
        def __init__(self, inputs: int, outputs: int, *sizes: int, **settings: Any) -> None:
            super().__init__(MUSIC_SIZES.get(inputs, inputs), MUSIC_SIZES.get(outputs, outputs), *sizes, **settings)

    operations = type("Operations", (comfy.ops.disable_weight_init,), {"Linear": Linear, "Conv1d": Conv1d})
    block = dit.TransformerBlock
    with (
        mock.patch.object(music, "custom_operations", operations),
        mock.patch.object(dit, "TransformerBlock", lambda _, __, ___, *settings: block(64, 32, 96, *settings)),
        mock.patch.object(dit, "range", lambda count: range(count // 4), create=True),
    ):
        yield


def _attend_fast(_: nn.Module) -> None:
    """With PyTorch's attention, as on a GPU: what ComfyUI takes on a CPU needs minutes for 4096 tokens."""
    from comfy.ldm.modules import attention

    trellis2 = import_module("comfy.ldm.trellis2.model")  # older ComfyUIs have none
    trellis2.optimized_attention = attention.attention_pytorch


_stable_audio = partial(
    Architecture,
    covers="audio/dit.py",
    prompt=text(768, seconds_total=lambda _: 5),
    prepare=set_buffers,
    chains=("transformer.layers",),
    attention=("spatial", "cross"),
    additions={"replaced blocks": replaced_blocks(4)},
)
_music = partial(
    Architecture,
    covers="minimax_music/dit.py",
    config="MiniMaxMusic3",
    unet=dict(audio_model="minimax_music3"),
    prompt=text(8 * 4096, tokens=20, conditioning_scale=lambda _: torch.ones(1, 1, 1)),
    prepare=set_buffers,
    is_detected=True,
    shrunk=_small_music,
)
_trellis = partial(Architecture, covers="trellis2/model.py", config="Trellis2", unet=TRELLIS)

ARCHITECTURES = [
    Architecture(
        name="ACE-Step 1",
        covers="ace/model.py",
        config="ACEStep",
        unet=ACE,
        latent=(1, 8, 16, 60),
        prompt=text(48, conditioning_lyrics=lambda draw: draw.whole(64, 1, 24)),
        chains=("transformer_blocks",),
        attention=("spatial", "cross"),
        live=("lyric_encoder.encoders",),
        shrunk=_short_lyrics,
    ),
    Architecture(
        name="ACE-Step 1.5",
        covers="ace/ace_step15.py",
        config="ACEStep15",
        unet=ACE_15,
        latent=(1, 64, 120),
        prompt=text(48, conditioning_lyrics=normal(1, 40, 48)),
        chains=("decoder.layers",),
        attention=("spatial", "cross"),
        live=(
            "encoder.lyric_encoder.layers",
            "encoder.timbre_encoder.layers",
            "tokenizer.attention_pooler.layers",
            "detokenizer.layers",
        ),
    ),
    _stable_audio(
        name="Stable Audio 1",
        config="StableAudio",
        unet=STABLE_AUDIO,
        latent=(1, 64, 60),
        beside=_seconds("seconds_start", "seconds_total", features="learned"),
    ),
    _stable_audio(
        name="Stable Audio 3",
        config="StableAudio3",
        unet=STABLE_AUDIO_3,
        latent=(1, 256, 60),
        is_detected=True,
        beside=_seconds("seconds_total", features="expo"),
    ),
    _music(
        name="MiniMax-Music3",
        latent=(1, 128, 60),
        chains=("diffusion_transformer.transformer.layers",),
        attention=("spatial",),
        note="What is longer than 8 seconds is denoised in windows within one call, so all blocks run.",
    ),
    _music(
        name="MiniMax-Music3, two windows",
        latent=(1, 128, 700),
        chains=(),
        is_slow=True,  # a window is 689 tokens
    ),
    Architecture(
        name="Hunyuan3D 2.1",
        covers="hunyuan3dv2_1/hunyuandit.py",
        config="Hunyuan3Dv2_1",
        unet=HUNYUAN,
        latent=(1, 64, 48),
        prompt=text(1024),
        chains=("blocks",),
        attention=("spatial", "cross"),
        is_detected=True,
        additions={"replaced blocks": replaced_blocks(9, key="block", stream=None)},
    ),
    _trellis(
        name="Trellis 2, structure",
        latent=(1, 32, 16, 16, 16),
        prompt=text(48, embeds=normal(1, TEXT, 48)),
        chains=("structure_model.blocks",),
        attention=("spatial", "cross"),
        prepare=_attend_fast,
        is_slow=True,  # its 4096 tokens are fixed
    ),
    _trellis(
        name="Trellis 2, shape",
        latent=(1, 32, VOXELS, 1),
        prompt=_shape_prompt,
        chains=(),
        note="Its shape and texture models work on sparse tensors, which no cache can read.",
    ),
    Architecture(
        name="TripoSplat",
        covers="triposplat/model.py",
        config="TripoSplat",
        unet=TRIPOSPLAT,
        latent=((1, 96, 16), (1, 1, 5)),
        prompt=text(48, tokens=21, reference_latents=reference(1, 128, 4, 4)),
        chains=("blocks",),
        attention=("spatial",),
        live=("noise_refiner", "context_refiner"),
        prepare=steady("t_embedder.mlp.0"),
    ),
]
