"""U-Nets: they have no list of blocks that feed each other, so only the whole model's output can be cached."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import additions
from .architecture import Architecture, Draw
from .prompts import normal, text

NOTE = "A U-Net: TaylorSeer works on its output, FasterCache on the negative prompt."

SD15 = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=32, context_dim=48, adm_in_channels=None,
    num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 2, 2], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], transformer_depth_middle=1,
    use_temporal_attention=False, use_spatial_transformer=True, use_linear_in_transformer=False, legacy=False,
    num_heads=4, num_head_channels=-1,
)  # fmt: skip
SDXL = SD15 | dict(
    adm_in_channels=1536 + 32, num_classes="sequential", num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 2],
    transformer_depth=[0, 0, 2, 2, 4, 4], transformer_depth_output=[0, 0, 0, 2, 2, 2, 4, 4, 4],
    transformer_depth_middle=4, use_linear_in_transformer=True, num_heads=-1, num_head_channels=16,
)  # fmt: skip
SVD = SDXL | dict(
    in_channels=8, adm_in_channels=768, num_res_blocks=[1, 1, 1], transformer_depth=[1, 1, 1],
    transformer_depth_output=[1, 1, 1, 1, 1, 1], transformer_depth_middle=1, context_dim=48,
    use_temporal_attention=True, use_temporal_resblock=True, extra_ff_mix_layer=True, use_spatial_context=True,
    merge_strategy="learned_with_images", merge_factor=0.0, video_kernel_size=[3, 1, 1],
    disable_temporal_crossattention=False, max_ddpm_temb_period=10000,
)  # fmt: skip


def _v_prediction(_: Draw) -> dict[str, Tensor]:
    """SDXL's mark of models that predict v; the prediction of noise would leave random weights all the noise."""
    return {"v_pred": torch.zeros(0)}


_unet = partial(Architecture, covers="modules/diffusionmodules/openaimodel.py", chains=(), note=NOTE)

ARCHITECTURES = [
    _unet(
        name="SD 1.5",
        config="SD15",
        unet=SD15,
        latent=(1, 4, 16, 16),
        prompt=text(48),
        additions={"ControlNet": additions.controlled(input=(2, 1, 32, 16, 16))},
    ),
    _unet(
        name="SDXL",
        config="SDXL",
        unet=SDXL,
        latent=(1, 4, 16, 16),
        prompt=text(48, pooled_output=normal(1, 32)),
        beside=_v_prediction,
    ),
    _unet(
        name="SVD",
        config="SVD_img2vid",
        unet=SVD,
        latent=(2, 4, 16, 16),
        prompt=text(48, tokens=1, concat_latent_image=normal(1, 4, 16, 16)),
    ),
]
