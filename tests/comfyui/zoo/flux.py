"""Flux and its relatives: two streams of tokens in double blocks, joined into one for the single blocks."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from .additions import controlled, patched
from .architecture import TEXT, Architecture, Draw
from .prompts import normal, nothing, reference, text
from .replacing import replaced_blocks

FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=32, context_in_dim=48,
    hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=2, depth_single_blocks=4, axes_dim=[16, 56, 56], theta=10000,
    qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
LONGCAT = FLUX | dict(guidance_embed=False, vec_in_dim=None, context_in_dim=3584, txt_ids_dims=[1, 2])
FLUX2 = dict(
    image_model="flux2", in_channels=128, out_channels=128, patch_size=1, vec_in_dim=None, context_in_dim=48,
    hidden_size=128, mlp_ratio=3.0, num_heads=1, depth=2, depth_single_blocks=4, axes_dim=[32, 32, 32, 32], theta=2000,
    qkv_bias=False, guidance_embed=True, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
    default_ref_method="index", ref_index_scale=10.0,
)  # fmt: skip
CHROMA = dict(
    image_model="chroma", in_channels=64, out_channels=64, patch_size=2, vec_in_dim=None, context_in_dim=48,
    hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=2, depth_single_blocks=4, axes_dim=[16, 56, 56], theta=10000,
    qkv_bias=True, txt_ids_dims=[], in_dim=64, out_dim=128, hidden_dim=64, n_layers=5,
)  # fmt: skip
RADIANCE = CHROMA | dict(
    image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=8, nerf_mlp_ratio=2,
    nerf_depth=2, nerf_max_freqs=4, nerf_tile_size=32, nerf_final_head_type="conv", nerf_embedder_dtype=torch.float32,
    use_x0=False, use_sequential_txt_ids=False,
)  # fmt: skip
HUNYUAN_VIDEO = dict(
    image_model="hunyuan_video", in_channels=16, out_channels=16, patch_size=[1, 2, 2], vec_in_dim=768,
    context_in_dim=48, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=2, depth_single_blocks=6,
    axes_dim=[16, 56, 56], theta=256, qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False,
    use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False,
)  # fmt: skip
HUNYUAN_VIDEO_15 = HUNYUAN_VIDEO | dict(
    in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, depth=6, depth_single_blocks=0,
    guidance_embed=False, byt5=True, use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True,
)  # fmt: skip
HUNYUAN_IMAGE = HUNYUAN_VIDEO | dict(
    in_channels=64, out_channels=64, patch_size=[1, 1], vec_in_dim=None, axes_dim=[64, 64], byt5=True, meanflow=True
)
HUNYUAN_3D = dict(
    image_model="hunyuan3d2", in_channels=64, context_in_dim=48, hidden_size=128, mlp_ratio=4.0, num_heads=16, depth=2,
    depth_single_blocks=4, qkv_bias=True, guidance_embed=False,
)  # fmt: skip

CHAINS = ("double_blocks", "single_blocks")
REFINER = "txt_in.individual_token_refiner.blocks"
MODULATION = "distilled_guidance_layer.layers"


def _hunyuan_video_15(draw: Draw) -> list:
    seen = SimpleNamespace(last_hidden_state=draw(1, 5, 1152))
    extra = {"pooled_output": None, "conditioning_byt5small": draw(1, 4, 1472), "clip_vision_output": seen}
    return [[draw(1, TEXT, 48), extra]]


def _as_trained(model: nn.Module) -> None:
    """Blocks that matter, though gates of random modulation are small, and no ear for the timestep's fast waves."""
    for name, weight in model.named_parameters():
        if name.startswith(CHAINS) and name.endswith(("proj.weight", "mlp.2.weight", "linear2.weight")):
            weight.data.mul_(3)
        if name == "time_in.in_layer.weight":
            weight.data.unflatten(1, (2, -1))[:, :, :64] = 0  # cosines and sines, the fastest first


_joined = partial(Architecture, chains=CHAINS, attention=("spatial",))
_flux = partial(_joined, covers="flux/model.py", latent=(1, 16, 16, 16), is_detected=True)
_radiance = partial(
    _joined,
    covers="chroma_radiance/model.py",
    config="ChromaRadiance",
    latent=(1, 3, 128, 128),
    prompt=text(48, pooled_output=nothing),
    live=(MODULATION, "nerf_blocks"),
)
_hunyuan_video = partial(_joined, covers="hunyuan_video/model.py", live=(REFINER,), is_detected=True)

ARCHITECTURES = [
    _flux(
        name="Flux",
        config="Flux",
        unet=FLUX,
        prompt=text(48, pooled_output=normal(1, 32)),
        additions={
            "ControlNet": controlled(input=(2, 1, 64, 128), output=(4, 1, 64, 128)),
            "post_input": patched("post_input"),
            "replaced double blocks": replaced_blocks(2),
            "replaced single blocks": replaced_blocks(4, key="single_block"),
        },
    ),
    _flux(
        name="Flux Kontext",
        config="Flux",
        unet=FLUX,
        prompt=text(48, pooled_output=normal(1, 32), reference_latents=reference(1, 16, 16, 16)),
    ),
    _flux(
        name="LongCat-Image",
        config="LongCatImage",
        unet=LONGCAT,
        prompt=text(3584),
        prepare=_as_trained,
        additions={"post_input": patched("post_input")},
    ),
    _flux(
        name="Flux2",
        config="Flux2",
        unet=FLUX2,
        latent=(1, 128, 24, 24),  # 576 tokens: more than the 512 to which ComfyUI pads every text
        prompt=text(48, tokens=64, pooled_output=nothing),
        prepare=_as_trained,
        additions={
            "ControlNet": controlled(input=(2, 1, 576, 128), output=(4, 1, 576, 128)),
            "post_input": patched("post_input"),
        },
        is_slow=True,  # so many tokens
    ),
    _joined(
        name="Chroma",
        covers="chroma/model.py",
        config="Chroma",
        unet=CHROMA,
        latent=(1, 16, 16, 16),
        prompt=text(48, pooled_output=nothing),
        live=(MODULATION,),
        additions={
            "ControlNet": controlled(input=(2, 1, 64, 128), output=(4, 1, 64, 128)),
            "replaced double blocks": replaced_blocks(2),
        },
    ),
    _radiance(
        name="Chroma Radiance",
        unet=RADIANCE,
        note="The head that draws the pixels always runs.",
    ),
    _radiance(
        name="Chroma Radiance, untiled",
        unet=RADIANCE | dict(nerf_tile_size=0),  # as a picture of fewer patches than a tile has
    ),
    _hunyuan_video(
        name="HunyuanVideo",
        config="HunyuanVideo",
        unet=HUNYUAN_VIDEO,
        latent=(1, 16, 3, 16, 16),
        prompt=text(48, pooled_output=normal(1, 768)),
        additions={
            "ControlNet": controlled(input=(2, 1, 192, 128), output=(6, 1, 192, 128)),
            "replaced double blocks": replaced_blocks(2),
        },
    ),
    _hunyuan_video(
        name="HunyuanVideo I2V",
        config="HunyuanVideoI2V",
        unet=HUNYUAN_VIDEO | dict(in_channels=33),
        latent=(1, 16, 3, 16, 16),
        prompt=text(48, pooled_output=normal(1, 768), concat_latent_image=normal(1, 16, 3, 16, 16)),
    ),
    _hunyuan_video(
        name="HunyuanVideo 1.5",
        config="HunyuanVideo15",
        unet=HUNYUAN_VIDEO_15,
        latent=(1, 32, 3, 8, 8),
        prompt=_hunyuan_video_15,
        chains=("double_blocks",),
        prepare=_as_trained,
    ),
    _hunyuan_video(
        name="HunyuanImage 2.1",
        config="HunyuanImage21",
        unet=HUNYUAN_IMAGE,
        latent=(1, 64, 12, 12),
        prompt=text(48, conditioning_byt5small=normal(1, 4, 1472)),
        prepare=_as_trained,
    ),
    _joined(
        name="Hunyuan3D 2",
        covers="hunyuan3d/model.py",
        config="Hunyuan3Dv2",
        unet=HUNYUAN_3D,
        latent=(1, 64, 96),
        prompt=text(48, pooled_output=nothing),
        is_detected=True,
        prepare=_as_trained,
        additions={"replaced double blocks": replaced_blocks(2)},
    ),
]
