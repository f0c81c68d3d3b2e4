"""The tiny Wan, text to video: its layout, its latents, and one call of it through diffusers.

Latents are what the transformer denoises. ComfyUI keeps them outside the model as latent * STD + MEAN, as of every Wan.
There they are the pictures' latents, frame by frame: the demo's VAE decodes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from . import WAN_HEADS, WAN_WEIGHTS, codec, words

TRAINED_TIMESTEPS = 1000
FRAMES, SIZE = 15, 96  # what it was trained for at last, as pixels of one side: 540 tokens

TRANSFORMER_CONFIG = {
    "num_attention_heads": WAN_HEADS,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": words.TOKEN_WIDTH,
    "ffn_dim": 512,
    "num_layers": 9,
    "rope_max_seq_len": 64,
}

# Of ComfyUI's Wan, what can't be read off the weights.
COMFYUI_CONFIG = {"text_dim": words.TOKEN_WIDTH, "num_heads": WAN_HEADS}

# Wan's latent format, as ComfyUI applies it around the model
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

_WANS_NAMES = {  # diffusers' and Wan's own, of the parts that have two
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm2": "norm3",  # the one before the cross-attention
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def wans_key(key: str) -> str:
    """The name in a Wan file of one of diffusers' weights.

    >>> wans_key("blocks.0.attn1.to_out.0.weight"), wans_key("blocks.0.scale_shift_table")
    ('blocks.0.self_attn.o.weight', 'blocks.0.modulation')
    """
    if key == "scale_shift_table":
        return "head.modulation"
    key = f".{key}.".replace("scale_shift_table", "modulation")
    for diffusers_name, name in _WANS_NAMES.items():
        key = key.replace(f".{diffusers_name}.", f".{name}.")
    return key.strip(".")


def load_transformer() -> nn.Module:
    """diffusers' transformer in float32 with the trained weights, ready to predict."""
    return transformer_of(load_file(WAN_WEIGHTS))


def transformer_of(stored: dict[str, Tensor]) -> nn.Module:
    """The same with the weights of any file that was exported."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel.from_config(TRANSFORMER_CONFIG)
    transformer.load_state_dict({key: stored[wans_key(key)].float() for key in transformer.state_dict()})
    return transformer.eval().requires_grad_(False)


def encode(videos: Tensor) -> Tensor:
    """Latents (batch, 16, frames, height / 8, width / 8) of videos (batch, frames, 3, height, width) in 0..1."""
    pictures = codec.encode(rearrange(videos, "batch frames color h w -> (batch frames) color h w"))
    latents = rearrange(pictures, "(batch frames) c h w -> batch c frames h w", batch=len(videos))
    return (latents / codec.FLUX_SCALE + codec.FLUX_SHIFT - _of_channels(MEAN, latents)) / _of_channels(STD, latents)


def decode(latents: Tensor) -> Tensor:
    """Videos (batch, frames, 3, 8 * h, 8 * w) in 0..1 of latents: the exact reference for measuring."""
    outside = latents * _of_channels(STD, latents) + _of_channels(MEAN, latents)
    pictures = rearrange((outside - codec.FLUX_SHIFT) * codec.FLUX_SCALE, "batch c frames h w -> (batch frames) c h w")
    return rearrange(codec.decode(pictures), "(batch frames) color h w -> batch frames color h w", batch=len(latents))


def noise(seed: int, frames: int, size: int) -> Tensor:
    """The starting noise of one video, (1, 16, frames, size / 8, size / 8), as ComfyUI makes it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, len(STD), frames, size // 8, size // 8, generator=generator)


def velocity(transformer: nn.Module, latent: Tensor, sigmas: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    """One call of the transformer: noise - video at latent (batch, 16, frames, h, w), in the latent's own dtype.

    The texts are those of sampling.encode_prompts; Wan hears the tokens only.
    """
    kind = {"device": latent.device, "dtype": transformer.dtype}
    predicted = transformer(
        hidden_states=latent.to(**kind),
        timestep=sigmas.to(latent.device) * TRAINED_TIMESTEPS,
        encoder_hidden_states=tokens.to(**kind),
        return_dict=False,
    )[0]
    return predicted.to(latent.dtype)


def _of_channels(numbers: Sequence[float], latents: Tensor) -> Tensor:
    return torch.tensor(numbers, device=latents.device)[:, None, None, None]
