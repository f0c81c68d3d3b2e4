"""Models of pictures whose blocks carry text and picture as one stream, or the picture alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from unittest import mock

import torch
from torch import nn

from .additions import controlled, patched
from .architecture import TEXT, Architecture, Draw
from .prompts import mask, normal, reference, text
from .replacing import replaced_blocks
from .weights import steady

TIME = 150  # HiDream-O1's token that carries the timestep, here in a smaller vocabulary


def _hidream_o1(draw: Draw) -> list:
    ids = torch.cat([draw.whole(TIME, 1, TEXT), torch.full((1, 1), TIME)], dim=1)
    return [[draw(1, TEXT, 8), {"text_input_ids": ids}]]


@contextmanager
def _small_adapter() -> Iterator[None]:
    anima = import_module("comfy.ldm.anima.model")  # older ComfyUIs have none

    with mock.patch.object(anima, "LLMAdapter", partial(anima.LLMAdapter, model_dim=64, num_layers=2, num_heads=4)):
        yield


def _prepare_hidream_o1(model: nn.Module) -> None:
    model.tms_token_id = TIME
    steady("t_embedder1.mlp.0")(model)
    model.x_embedder.proj1.weight.data *= 0.1  # its noise is 8 times as large


def _prepare_z_image_pixel(model: nn.Module) -> None:
    steady("t_embedder.mlp.0", heard=0.2)(model)
    model.t_embedder.mlp[0].weight.data *= 0.3


def _prepare_krea2(model: nn.Module) -> None:
    steady("tmlp.0")(model)
    model.last.linear.weight.data *= 0.4


LUMINA2 = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=96, cap_feat_dim=48, n_layers=24, n_heads=2, n_kv_heads=1,
    multiple_of=32, ffn_dim_multiplier=1.0, qk_norm=True, axes_dims=[16, 16, 16], axes_lens=[300, 64, 64],
)  # fmt: skip
Z_IMAGE = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=256, cap_feat_dim=48, n_layers=24, n_heads=2, n_kv_heads=1,
    multiple_of=32, ffn_dim_multiplier=0.1, qk_norm=True, axes_dims=[32, 48, 48], axes_lens=[300, 64, 64],
    rope_theta=256.0, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=8,
)  # fmt: skip
Z_IMAGE_PIXEL = {
    **Z_IMAGE, "image_model": "zimage_pixel", "patch_size": 4, "in_channels": 3, "decoder_hidden_size": 32,
    "decoder_num_res_blocks": 2, "decoder_max_freqs": 8, "decoder_in_channels": 48,
}  # fmt: skip
HIDREAM_O1 = dict(
    image_model="hidream_o1",
    text_config_overrides=dict(
        vocab_size=TIME + 1, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1,
    ),
    vision_config_overrides=dict(
        hidden_size=32, num_heads=2, intermediate_size=64, depth=2, num_position_embeddings=16,
    ),
)  # fmt: skip
PIXART = dict(
    image_model="pixart_sigma", patch_size=2, in_channels=4, hidden_size=64, depth=4, num_heads=4, caption_channels=48,
    micro_condition=False, model_max_length=16, input_size=16, pe_interpolation=1,
)  # fmt: skip
HUNYUANDIT = dict(
    image_model="hydit", depth=6, hidden_size=128, num_heads=4, text_states_dim=64, text_states_dim_t5=64,
    text_len=TEXT, text_len_t5=2 * TEXT,
)  # fmt: skip
OMNIGEN2 = dict(
    image_model="omnigen2", patch_size=2, in_channels=16, hidden_size=96, num_layers=24, num_refiner_layers=2,
    num_attention_heads=4, num_kv_heads=2, multiple_of=32, axes_dim_rope=[8, 8, 8], axes_lens=[300, 64, 64],
    text_feat_dim=48, timestep_scale=1000.0,
)  # fmt: skip
KREA2 = dict(
    image_model="krea2", features=128, channels=16, patch=2, layers=8, heads=1, kvheads=1, txtlayers=2, txtdim=80,
)  # fmt: skip
ERNIE = dict(
    image_model="ernie", hidden_size=128, num_attention_heads=1, num_layers=4, ffn_hidden_size=256, text_in_dim=48,
)  # fmt: skip
IDEOGRAM4 = dict(
    image_model="ideogram4", in_channels=128, num_layers=4, num_attention_heads=2, attention_head_dim=64,
    intermediate_size=256, adaln_dim=64, llm_features_dim=48, mrope_section=[12, 10, 10],
)  # fmt: skip
COSMOS = dict(  # 10 blocks: what ComfyUI 0.8.0 takes for granted at such a width
    image_model="cosmos_predict2", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
    patch_spatial=2, patch_temporal=1, concat_padding_mask=True, model_channels=192, num_blocks=10,
    crossattn_emb_channels=1024, pos_emb_cls="rope3d", pos_emb_learnable=True, use_adaln_lora=True, adaln_lora_dim=256,
    rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0, rope_enable_fps_modulation=False,
)  # fmt: skip

REFINERS = ("noise_refiner", "context_refiner")
_lumina = partial(
    Architecture,
    covers="lumina/model.py",
    latent=(1, 16, 16, 16),
    chains=("layers",),
    attention=("spatial",),
    live=REFINERS,
)
_cosmos = partial(
    Architecture, latent=(1, 16, 1, 16, 16), chains=("blocks",), attention=("spatial", "cross"), is_detected=True
)

ARCHITECTURES = [
    _lumina(
        name="Lumina 2",
        config="Lumina2",
        unet=LUMINA2,
        prompt=text(48, attention_mask=mask()),
        additions={"double_block": patched("double_block")},
    ),
    _lumina(
        name="Z-Image",
        config="ZImage",
        unet=Z_IMAGE,
        prompt=text(48),
        prepare=steady("t_embedder.mlp.0", heard=0.2),
        additions={"double_block": patched("double_block"), "noise_refiner": patched("noise_refiner")},
    ),
    _lumina(
        name="Z-Image in pixel space",
        config="ZImagePixelSpace",
        unet=Z_IMAGE_PIXEL,
        latent=(1, 3, 32, 32),
        prompt=text(48),
        prepare=_prepare_z_image_pixel,
        live=(*REFINERS, "dec_net.res_blocks"),
        additions={"double_block": patched("double_block")},
    ),
    Architecture(
        name="HiDream-O1",
        covers="hidream_o1/model.py",
        config="HiDreamO1",
        unet=HIDREAM_O1,
        latent=(1, 3, 256, 256),
        prompt=_hidream_o1,
        prepare=_prepare_hidream_o1,
        chains=("language_model.layers",),
        attention=("spatial",),
        live=("visual.blocks",),
        note="The first call of each prompt is computed: the model then fills a cache of its own.",
        additions={"replaced blocks": replaced_blocks(4, stream="x")},
    ),
    Architecture(
        name="PixArt",
        covers="pixart/pixartms.py",
        config="PixArtSigma",
        unet=PIXART,
        latent=(1, 4, 40, 40),
        prompt=text(48),
        prepare=steady("t_embedder.mlp.0"),
        chains=("blocks",),
        attention=("spatial", "cross"),
    ),
    Architecture(
        name="HunyuanDiT",
        covers="hydit/models.py",
        config="HunyuanDiT",
        unet=HUNYUANDIT,
        latent=(1, 4, 16, 16),
        prompt=text(
            64,
            conditioning_mt5xl=normal(1, 2 * TEXT, 64),
            attention_mask=mask(),
            attention_mask_mt5xl=mask(2 * TEXT),
        ),
        chains=("blocks",),
        attention=("spatial", "cross"),
        additions={"ControlNet": controlled(output=(2, 1, 64, 128)), "replaced blocks": replaced_blocks(6)},
    ),
    Architecture(
        name="OmniGen2",
        covers="omnigen/omnigen2.py",
        config="Omnigen2",
        unet=OMNIGEN2,
        latent=(1, 16, 16, 16),
        prompt=text(48, attention_mask=mask(), reference_latents=reference(1, 16, 8, 8)),
        prepare=steady("time_caption_embed.timestep_embedder.linear_1"),
        chains=("layers",),
        attention=("spatial",),
        live=("noise_refiner", "ref_image_refiner", "context_refiner"),
    ),
    Architecture(
        name="Krea 2",
        covers="krea2/model.py",
        config="Krea2",
        unet=KREA2,
        latent=(1, 16, 1, 16, 16),
        prompt=text(160),
        prepare=_prepare_krea2,
        chains=("blocks",),
        attention=("spatial",),
        live=("txtfusion.layerwise_blocks", "txtfusion.refiner_blocks"),
        is_detected=True,
        additions={"post_input": patched("post_input")},
    ),
    Architecture(
        name="Ernie-Image",
        covers="ernie/model.py",
        config="ErnieImage",
        unet=ERNIE,
        latent=(1, 128, 8, 8),
        prompt=text(48),
        prepare=steady("time_embedding.linear_1", "adaLN_modulation"),
        chains=("layers",),
        attention=("spatial",),
    ),
    Architecture(
        name="Ideogram 4",
        covers="ideogram4/model.py",
        config="Ideogram4",
        unet=IDEOGRAM4,
        latent=(1, 128, 8, 8),
        prompt=text(48),
        prepare=steady("t_embedding.mlp_in", heard=0.15),
        chains=("layers",),
        attention=("spatial",),
    ),
    _cosmos(
        name="Cosmos-Predict2",
        covers="cosmos/predict2.py",
        config="CosmosT2IPredict2",
        unet=COSMOS,
        prompt=text(1024),
    ),
    _cosmos(
        name="Anima",
        covers="anima/model.py",
        config="Anima",
        unet={**COSMOS, "image_model": "anima"},
        prompt=text(1024, t5xxl_ids=lambda draw: draw.whole(32128, TEXT), t5xxl_weights=lambda draw: torch.ones(TEXT)),
        live=("llm_adapter.blocks",),
        shrunk=_small_adapter,
        additions={"post_input": patched("post_input")},
    ),
]
