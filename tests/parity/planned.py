"""A tiny model of each transformer that diffusers has a plan for, to share a forward pass among two ranks or four.

Each with a number of tokens that ranks can share out evenly, and one that they can't.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from models import (
    FLUX,
    FLUX2,
    HUNYUAN_VIDEO,
    LTX,
    QWEN_IMAGE,
    TEXT_WIDTH,
    WAN,
    WAN_SETTINGS,
    Denoiser,
    Inputs,
    tiny,
)
from torch import Tensor, nn

HEADS = 4  # Ulysses shares out heads
UNEVEN_VIDEO = (1, 4, 3, 6, 6)  # 27 tokens


def with_heads(denoiser: Denoiser, **settings: Any) -> Denoiser:
    """The same model with a head for each of four ranks."""

    def model() -> nn.Module:
        made = denoiser.model()
        return type(made).from_config(dict(made.config) | {"num_attention_heads": HEADS} | settings)

    return replace(denoiser, model=model)


def changed(denoiser: Denoiser, latent: tuple[int, ...] = (), **arguments: Callable[..., Any]) -> Denoiser:
    """A model that is called with other arguments, maybe of another shape."""
    inputs: Inputs = lambda *given: denoiser.inputs(*given) | {name: make(*given) for name, make in arguments.items()}  # noqa: E731
    return replace(denoiser, inputs=inputs, latent=latent or denoiser.latent)


def with_four_words(denoiser: Denoiser) -> Denoiser:
    """The same model on a text that four ranks can share out evenly."""
    return replace(denoiser, inputs=lambda latent, text, timestep: denoiser.inputs(latent, text[:, :4], timestep))


def places(rows: int, columns: int, axes: int) -> Tensor:
    """Where on a picture each token is."""
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    return torch.nn.functional.pad(grid, (0, axes - 3))


def of_flux2(name: str) -> Callable[..., Tensor]:
    return lambda *given: FLUX2.inputs(*given)[name][None]  # as Flux.2's pipeline passes them


def ltx2(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    video = dict(hidden_states=latent, encoder_hidden_states=text, encoder_attention_mask=None)
    sound = dict(audio_hidden_states=0.5 * latent[:, :8], audio_encoder_hidden_states=text, audio_num_frames=8)
    return video | sound | dict(timestep=timestep[:, None], sigma=timestep, num_frames=2, height=4, width=4)


def minimax(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    """The text's tokens, the video's and four of the sound's."""
    counts = (text.shape[1], latent.shape[1], 4)
    first = torch.arange(float(sum(counts)))
    of_text, of_video, of_sound = torch.arange(sum(counts)).split(counts)
    streams = dict(hidden_states=latent, audio_hidden_states=0.5 * latent[:, : counts[2]], encoder_hidden_states=text)
    where = dict(video_indices=of_video, audio_indices=of_sound, text_indices=of_text)
    return (
        streams
        | where
        | dict(
            timestep=timestep[:1] / 1000,
            timestep_indices=torch.zeros(sum(counts), dtype=torch.long),
            token_tags=torch.repeat_interleave(torch.tensor([1, 0, 2]), torch.tensor(counts)),
            position_ids=torch.stack([first, first % 4, first % 3], -1),
        )
    )


CHRONO_EDIT = replace(WAN, model=tiny("ChronoEditTransformer3DModel", **WAN_SETTINGS, rope_temporal_skip_len=1))
HELIOS = replace(
    WAN,
    model=tiny(
        "HeliosTransformer3DModel",
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=4,
        rope_dim=(4, 6, 6),
    ),
)
LTX2 = Denoiser(
    "LTX2",
    lambda: diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=16,
        cross_attention_dim=64,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=32,
        num_layers=4,
        caption_channels=TEXT_WIDTH,
    ),
    latent=(1, 32, 4),
    inputs=ltx2,
    branches="joined",
)
MINIMAX_H3 = Denoiser(
    "MiniMaxH3",
    lambda: diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=16,
        hidden_size=64,
        num_layers=4,
        num_refiner_layers=1,
        ffn_dim=64,
        in_channels=1,
        audio_in_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=2,
    ),
    latent=(1, 122, 4),
    inputs=minimax,
    branches="apart",
)
UNMASKED_LTX = changed(LTX, encoder_attention_mask=lambda *_: None)  # Ulysses takes no mask
MODELS = {
    "Flux": with_heads(FLUX),
    "Flux.2": with_heads(changed(FLUX2, img_ids=of_flux2("img_ids"), txt_ids=of_flux2("txt_ids"))),
    "Wan": with_heads(WAN),
    "ChronoEdit": with_heads(CHRONO_EDIT),
    "Helios": with_heads(HELIOS),
    "Qwen-Image": with_heads(QWEN_IMAGE),
    "LTX": with_heads(UNMASKED_LTX, cross_attention_dim=64),
    "LTX-2": LTX2,
    "MiniMax-H3": MINIMAX_H3,
    "HunyuanVideo": with_heads(HUNYUAN_VIDEO),
}
EVEN = {name: with_four_words(denoiser) for name, denoiser in MODELS.items()} | {"MiniMax-H3": MINIMAX_H3}
UNMASKED = EVEN | {  # Ulysses and ring at once take no mask, nor does an uneven ring
    "Qwen-Image": changed(EVEN["Qwen-Image"], encoder_hidden_states_mask=lambda *_: None)
}
UNEVEN = {
    "Flux": changed(MODELS["Flux"], (1, 35, 4), img_ids=lambda *_: places(5, 7, 3)),
    "Flux.2": changed(MODELS["Flux.2"], (1, 35, 4), img_ids=lambda *_: places(5, 7, 4)[None]),
    "Wan": replace(MODELS["Wan"], latent=UNEVEN_VIDEO),
    "ChronoEdit": replace(MODELS["ChronoEdit"], latent=UNEVEN_VIDEO),
    "Helios": replace(MODELS["Helios"], latent=UNEVEN_VIDEO),
    "Qwen-Image": changed(
        MODELS["Qwen-Image"],
        (1, 35, 4),
        img_shapes=lambda latent, *_: [[(1, 5, 7)]] * len(latent),
        encoder_hidden_states_mask=lambda *_: None,
    ),
    "LTX": changed(MODELS["LTX"], (1, 30, 4), height=lambda *_: 3, width=lambda *_: 5),
    "LTX-2": changed(LTX2, (1, 30, 4), height=lambda *_: 3, width=lambda *_: 5),
    "MiniMax-H3": replace(MINIMAX_H3, latent=(1, 121, 4)),
    "HunyuanVideo": replace(MODELS["HunyuanVideo"], latent=UNEVEN_VIDEO),
}
SPLIT = {
    name: ContextParallelInput(split_dim=1, expected_dims=3) for name in ("hidden_states", "encoder_hidden_states")
}
OF_A_USER = {  # for a model without a plan: split at the first block of the first list, gathered at the last
    "rope": {place: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True) for place in (0, 1)},
    "transformer_blocks.0": SPLIT,
    "single_transformer_blocks.2": [ContextParallelOutput(gather_dim=1, expected_dims=3)] * 2,
}


TURNED = {place: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True) for place in (0, 1)}
MENDED = {"LTX2VideoTransformer3DModel": {"cross_attn_rope": TURNED}}  # diffusers leaves these whole, and fails


def plan_of(model: nn.Module) -> dict[str, Any]:
    """diffusers' plan, but for blocks that a tiny model has not: Helios' names all forty. Else a user's."""
    plan, modules = model._cp_plan or OF_A_USER, dict(model.named_modules())
    plan = {place: split for place, split in plan.items() if "*" in place or place in modules}
    return plan | MENDED.get(type(model).__name__, {})
