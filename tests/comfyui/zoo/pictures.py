"""Models of pictures whose blocks carry text and picture as two streams."""

from __future__ import annotations

from functools import partial

from torch import nn

from .additions import controlled, patched
from .architecture import TEXT, Architecture, Draw
from .prompts import mask, normal, reference, text
from .replacing import replaced_blocks
from .weights import steady

QWEN_IMAGE = dict(
    image_model="qwen_image", in_channels=64, num_layers=4, attention_head_dim=128, num_attention_heads=1,
    joint_attention_dim=64,
)  # fmt: skip
MAGE_FLOW = dict(
    image_model="mage_flow", in_channels=128, num_layers=4, attention_head_dim=128, num_attention_heads=1,
    joint_attention_dim=64,
)  # fmt: skip
LENS = dict(
    image_model="lens", in_channels=128, out_channels=32, num_layers=4, num_attention_heads=2, enc_hidden_dim=48,
    multi_layer_encoder_feature=True, selected_layer_index=(0, 1),
)  # fmt: skip
JOYIMAGE = dict(
    image_model="joyimage", in_channels=16, hidden_size=128, patch_size=[1, 2, 2], num_layers=4, num_attention_heads=1,
    text_dim=4096,
)  # fmt: skip
HIDREAM = dict(
    image_model="hidream", attention_head_dim=128, axes_dims_rope=[64, 32, 32], caption_channels=[48, 48],
    max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1, 2, 3, 4, 5], num_attention_heads=1,
    num_routed_experts=4, num_activated_experts=2, num_layers=2, num_single_layers=4, out_channels=16, patch_size=2,
    text_emb_dim=32,
)  # fmt: skip
SD3 = dict(
    in_channels=16, out_channels=16, patch_size=2, depth=4, input_size=None, adm_in_channels=32, qk_norm=None,
    context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=48, out_features=256)),
    num_patches=256, pos_embed_max_size=16, pos_embed_scaling_factor=None, x_block_self_attn_layers=[],
)  # fmt: skip
AURAFLOW = dict(cond_seq_dim=48, max_seq=64, dim=64, global_conddim=64, n_heads=2, n_layers=10, n_double_layers=2)
BOOGU = dict(
    image_model="boogu", hidden_size=96, num_layers=12, num_double_stream_layers=4, num_attention_heads=4,
    num_kv_heads=2, multiple_of=32, axes_dim_rope=(8, 8, 8), axes_lens=(300, 64, 64), instruction_feat_dim=48,
)  # fmt: skip
PIXELDIT = dict(
    image_model="pixeldit_t2i", num_groups=4, hidden_size=128, pixel_hidden_size=4, pixel_attn_hidden_size=32,
    pixel_num_groups=2, patch_depth=4, patch_size=4, txt_embed_dim=48, txt_max_length=16,
)  # fmt: skip
PID = {**PIXELDIT, "image_model": "pid", "lq_hidden_dim": 16, "lq_num_res_blocks": 2}


def _prepare_sd3(model: nn.Module) -> None:
    steady("t_embedder.mlp.0")(model)
    model.pos_embed.copy_(0.3 * Draw(5)(*model.pos_embed.shape))


def _prepare_pixeldit(model: nn.Module) -> None:
    """All waves of its timestep are fast: they are heard faintly."""
    steady("t_embedder.mlp.0", "adaLN_modulation_img", "adaLN_modulation_txt", heard=1.0)(model)
    model.t_embedder.mlp[0].weight.data *= 0.05


QWEN_ADDITIONS = {
    "ControlNet": controlled(input=(2, 1, 64, 128)),
    "double_block": patched("double_block"),
    "replaced blocks": replaced_blocks(4),
}
_like_qwen = partial(
    Architecture,
    prepare=steady("time_text_embed.timestep_embedder.linear_1", "_mod."),
    chains=("transformer_blocks",),
    attention=("spatial",),
)
_qwen_image = partial(
    _like_qwen, covers="qwen_image/model.py", config="QwenImage", unet=QWEN_IMAGE, latent=(1, 16, 1, 16, 16)
)
_sd3 = partial(
    Architecture,
    covers="modules/diffusionmodules/mmdit.py",
    config="SD3",
    latent=(1, 16, 16, 16),
    prompt=text(48, pooled_output=normal(1, 32)),
    prepare=_prepare_sd3,
    chains=("joint_blocks",),
    attention=("spatial",),
    is_detected=True,
)
_pixeldit = partial(
    Architecture,
    latent=(1, 3, 32, 32),
    prepare=_prepare_pixeldit,
    chains=("patch_blocks",),
    attention=("spatial",),
)

ARCHITECTURES = [
    _qwen_image(
        name="Qwen-Image",
        prompt=text(64),
        additions=QWEN_ADDITIONS,
    ),
    _qwen_image(
        name="Qwen-Image-Edit",
        prompt=text(64, reference_latents=reference(1, 16, 1, 8, 8)),
    ),
    _like_qwen(
        name="Mage-Flow",
        covers="mage_flow/model.py",
        config="MageFlow",
        unet=MAGE_FLOW,
        latent=(1, 128, 8, 8),
        prompt=text(64),
        additions=QWEN_ADDITIONS | {"post_input": patched("post_input")},
    ),
    _like_qwen(
        name="Lens",
        covers="lens/model.py",
        config="Lens",
        unet=LENS,
        latent=(1, 128, 8, 8),
        prompt=text(96),
        is_detected=True,
        additions=QWEN_ADDITIONS,
    ),
    Architecture(
        name="JoyImage",
        covers="joyimage/model.py",
        config="JoyImage",
        unet=JOYIMAGE,
        latent=(1, 16, 1, 16, 16),
        prompt=text(4096),
        prepare=steady("condition_embedder.time_embedder.linear_1"),
        chains=("double_blocks",),
        attention=("spatial",),
        is_detected=True,
        additions={"replaced blocks": replaced_blocks(4)},
    ),
    Architecture(
        name="HiDream-I1",
        covers="hidream/model.py",
        config="HiDream",
        unet=HIDREAM,
        latent=(1, 16, 16, 16),
        prompt=text(48, pooled_output=normal(1, 32), conditioning_llama3=normal(1, 6, TEXT, 48)),
        prepare=steady("t_embedder.timestep_embedder.linear_1"),
        chains=("double_stream_blocks", "single_stream_blocks"),
        attention=("spatial",),
        live=("caption_projection",),
    ),
    _sd3(
        name="Stable Diffusion 3",
        unet=SD3,
        additions={
            "ControlNet": controlled(output=(2, 1, 64, 256)),
            "replaced blocks": replaced_blocks(4),
        },
    ),
    _sd3(
        name="Stable Diffusion 3.5 Medium",
        unet={**SD3, "qk_norm": "rms", "x_block_self_attn_layers": [0, 1]},
        additions={"ControlNet": controlled(output=(2, 1, 64, 256))},
    ),
    Architecture(
        name="AuraFlow",
        covers="aura/mmdit.py",
        config="AuraFlow",
        unet=AURAFLOW,
        latent=(1, 4, 16, 16),
        prompt=text(48),
        prepare=steady("t_embedder.mlp.0", "modC", "modX"),
        chains=("double_layers", "single_layers"),
        attention=("spatial",),
        additions={
            "replaced double layers": replaced_blocks(2),
            "replaced single layers": replaced_blocks(2, key="single_block"),
        },
    ),
    Architecture(
        name="Boogu-Image",
        covers="boogu/model.py",
        config="Boogu",
        unet=BOOGU,
        latent=(1, 16, 16, 16),
        prompt=text(48, attention_mask=mask()),
        prepare=steady("time_caption_embed.timestep_embedder.linear_1"),
        chains=("double_stream_layers", "single_stream_layers"),
        attention=("spatial",),
        live=("noise_refiner", "ref_image_refiner", "context_refiner"),
    ),
    _pixeldit(
        name="PixelDiT",
        covers="pixeldit/model.py",
        config="PixelDiTT2I",
        unet=PIXELDIT,
        prompt=text(48),
        live=("pixel_blocks",),
    ),
    _pixeldit(
        name="PiD",
        covers="pixeldit/pid.py",
        config="PiD",
        unet=PID,
        prompt=text(48, lq_latent=normal(1, 16, 2, 2), degrade_sigma=lambda draw: draw(1).abs()),
        live=("pixel_blocks", "lq_proj.output_heads", "lq_proj.gate_modules"),
    ),
]
