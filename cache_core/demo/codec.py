"""Pictures to latents and back: an exact linear codec, and the small VAE trained to imitate it.

Latents are those the transformer denoises. ComfyUI keeps them as latent / FLUX_SCALE + FLUX_SHIFT outside the model.
"""

from __future__ import annotations

from functools import cache

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from . import LATENT_CODEC, VAE_WEIGHTS

FLUX_SCALE = 0.3611  # Flux's latent format, as ComfyUI applies it around the model
FLUX_SHIFT = 0.1159


def encode(pictures: Tensor) -> Tensor:
    """Latents (batch, 16, height / 8, width / 8) of pictures (batch, 3, height, width) in 0..1."""
    codec = _codec(pictures.device)
    patches = rearrange(pictures.float() * 2 - 1, "batch color (h p) (w q) -> batch h w (color p q)", p=8, q=8)
    latents = (patches - codec["mean"]) @ codec["encoder"].T
    return rearrange(latents, "batch h w channels -> batch channels h w").contiguous()


def decode(latents: Tensor) -> Tensor:
    """Pictures (batch, 3, 8 * h, 8 * w) in 0..1 of latents (batch, 16, h, w): the exact reference for measuring."""
    codec = _codec(latents.device)
    patches = rearrange(latents.float(), "batch channels h w -> batch h w channels") @ codec["decoder"].T
    pictures = rearrange(patches + codec["mean"], "batch h w (color p q) -> batch color (h p) (w q)", color=3, p=8, q=8)
    return _to_unit_range(pictures)


def load_vae(device: str | torch.device = "cpu") -> nn.Module:
    """The demo's VAE as diffusers' AutoencoderTiny, with the scaling_factor that its pipelines expect."""
    from diffusers import AutoencoderTiny

    stored = load_file(VAE_WEIGHTS)
    scaling_factor = FLUX_SCALE / stored["vae_scale"].item()
    vae = AutoencoderTiny(latent_channels=16, scaling_factor=scaling_factor)
    vae.load_state_dict({key: stored[taesd_key(key)] for key in vae.state_dict()})
    return vae.eval().requires_grad_(False).to(device)


@torch.no_grad()
def decode_with_vae(vae: nn.Module, latents: Tensor) -> Tensor:
    """Pictures (batch, 3, 8 * h, 8 * w) in 0..1, as a user of the VAE sees them."""
    return _to_unit_range(vae.decode(latents / vae.config.scaling_factor).sample)


def taesd_key(key: str) -> str:
    """The name in a TAESD file of one of AutoencoderTiny's weights.

    >>> taesd_key("decoder.layers.0.weight"), taesd_key("encoder.layers.0.weight")
    ('taesd_decoder.1.weight', 'taesd_encoder.0.weight')
    """
    part, _, index, rest = key.split(".", 3)
    offset = 1 if part == "decoder" else 0  # TAESD counts its clamp as the decoder's layer 0
    return f"taesd_{part}.{int(index) + offset}.{rest}"


def _to_unit_range(pictures: Tensor) -> Tensor:
    return (pictures / 2 + 0.5).clamp(0, 1)


@cache
def _codec(device: torch.device) -> dict[str, Tensor]:
    return load_file(LATENT_CODEC, device=str(device))
