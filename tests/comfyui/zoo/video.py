"""Video models of their own families, with and without sound."""

from __future__ import annotations

import json
from functools import partial

from torch import nn

from .architecture import Architecture, Draw
from .prompts import mask, normal, text
from .replacing import replaced_blocks
from .weights import set_buffers, steady, with_wide_gates

LTXV = dict(
    image_model="ltxv", num_layers=4, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=64,
    caption_channels=48, in_channels=128,
)  # fmt: skip
LTX_AV = LTXV | dict(
    image_model="ltxav", audio_in_channels=128, audio_num_attention_heads=2, audio_attention_head_dim=16,
    audio_cross_attention_dim=32, connector_attention_head_dim=24, connector_num_attention_heads=2,
    connector_num_layers=2,
)  # fmt: skip
COSMOS = dict(
    image_model="cosmos", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
    patch_spatial=2, patch_temporal=1, model_channels=64, block_config="FA-CA-MLP", concat_padding_mask=True,
    pos_emb_cls="rope3d", pos_emb_learnable=False, pos_emb_interpolation="crop", block_x_format="THWBD",
    affline_emb_norm=True, use_adaln_lora=True, adaln_lora_dim=32, num_blocks=4, num_heads=2,
    extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable", rope_h_extrapolation_ratio=1.0,
    rope_w_extrapolation_ratio=1.0, rope_t_extrapolation_ratio=2.0,
)  # fmt: skip
COGVIDEOX = dict(
    image_model="cogvideox", num_attention_heads=1, attention_head_dim=64, in_channels=16, time_embed_dim=48,
    text_embed_dim=48, num_layers=4, use_rotary_positional_embeddings=True,
)  # fmt: skip
MOCHI = dict(
    image_model="mochi_preview", depth=4, patch_size=2, num_heads=2, hidden_size_x=64, hidden_size_y=32,
    mlp_ratio_x=12288 / 64, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False,
    out_bias=True, attn_drop=0.0, patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True,
    attend_to_padding=False, timestep_scale=1000.0, use_t5=True, t5_feat_dim=48, t5_token_length=256,
    rope_theta=10000.0,
)  # fmt: skip
KANDINSKY = dict(
    image_model="kandinsky5", model_dim=128, ff_dim=256, time_dim=64, visual_embed_dim=132, num_text_blocks=2,
    num_visual_blocks=8,
)  # fmt: skip
SEEDVR = dict(
    image_model="seedvr2", vid_dim=64, heads=2, head_dim=32, num_layers=4, mm_layers=2, norm_eps=1e-5,
    mlp_type="swiglu", vid_out_norm=True, rope_dim=32,
)  # fmt: skip
MINIMAX = dict(
    image_model="minimax_h3", hidden_size=64, num_layers=4, token_refiner_num_layers=2, num_attention_heads=2,
    attention_head_dim=32, ffn_hidden_size=128, text_dim=48, time_embed_hidden_size=64, time_embed_dim=32,
    rope_inv_freq_len=4,
)  # fmt: skip


def _prepare_minimax(model: nn.Module) -> None:
    with_wide_gates("adaln_proj")(model.blocks)
    set_buffers(model)


_long_text = text(48, tokens=24)  # of 7 tokens the picture's take little notice

_ltx = partial(
    Architecture,
    chains=("transformer_blocks",),
    attention=("spatial", "cross"),
    is_detected=True,
    additions={"replaced blocks": replaced_blocks(4)},
)

ARCHITECTURES = [
    _ltx(
        name="LTXV",
        covers="lightricks/model.py",
        config="LTXV",
        unet=LTXV,
        latent=(1, 128, 3, 8, 8),
        prompt=text(48, attention_mask=mask()),
        metadata={"config": json.dumps({"transformer": LTXV})},
    ),
    _ltx(
        name="LTX-2",
        covers="lightricks/av_model.py",
        config="LTXAV",
        unet=LTX_AV,
        latent=((1, 128, 3, 8, 8), (1, 8, 6, 16)),
        prompt=text(96),  # what is 2 caption_channels wide has been through the connectors
        metadata={"config": json.dumps({"transformer": LTX_AV})},
        prepare=steady("adaln_single.emb.timestep_embedder.linear_1"),
    ),
    Architecture(
        name="Cosmos 1",
        covers="cosmos/model.py",
        config="CosmosT2V",
        unet=COSMOS,
        latent=(1, 16, 3, 16, 16),
        prompt=text(1024),
        chains=("blocks",),
        attention=("spatial", "cross"),
    ),
    Architecture(
        name="CogVideoX",
        covers="cogvideo/model.py",
        config="CogVideoX_T2V",
        unet=COGVIDEOX,
        latent=(1, 16, 2, 16, 16),
        prompt=_long_text,
        chains=("blocks",),
        attention=("spatial",),
        is_detected=True,
        prepare=steady("time_embedding_linear_1", "norm1.linear", "norm2.linear"),
    ),
    Architecture(
        name="Mochi",
        covers="genmo/joint_model/asymm_models_joint.py",
        config="GenmoMochi",
        unet=MOCHI,
        latent=(1, 12, 2, 8, 8),
        prompt=text(48, attention_mask=mask()),
        chains=("blocks",),
        attention=("spatial",),
        prepare=steady("t_embedder.mlp.0"),
        additions={"replaced blocks": replaced_blocks(4)},
    ),
    Architecture(
        name="Kandinsky 5",
        covers="kandinsky5/model.py",
        config="Kandinsky5",
        unet=KANDINSKY,
        latent=(1, 16, 2, 16, 16),
        prompt=text(3584, pooled_output=normal(1, 768)),
        chains=("visual_transformer_blocks",),
        attention=("spatial", "cross"),
        live=("text_transformer_blocks",),
        is_detected=True,
        prepare=steady("time_embeddings.in_layer"),
    ),
    Architecture(
        name="SeedVR2",
        covers="seedvr/model.py",
        config="SeedVR2",
        unet=SEEDVR,
        latent=(1, 16, 3, 16, 16),
        prompt=text(5120, condition=lambda _: Draw(5)(1, 17, 3, 16, 16)),  # the same for both branches
        chains=("blocks",),
        attention=("spatial",),
        additions={"replaced blocks": replaced_blocks(4, key="block", stream="vid")},
    ),
    Architecture(
        name="MiniMax-H3",
        covers="minimax/model.py",
        config="MiniMaxH3",
        unet=MINIMAX,
        latent=((1, 24, 3, 12, 12), (1, 32, 2, 6)),
        prompt=_long_text,
        chains=("blocks",),
        attention=("spatial",),
        is_detected=True,
        prepare=_prepare_minimax,
        additions={"replaced blocks": replaced_blocks(4)},
    ),
]
