"""A tiny trained Flux and a tiny trained Wan, small enough to ship: real caching on a CPU, without a download."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"

FLUX_WEIGHTS = _WEIGHTS / "refrain_demo_flux.safetensors"
WAN_WEIGHTS = _WEIGHTS / "refrain_demo_wan.safetensors"
VAE_WEIGHTS = _WEIGHTS / "refrain_demo_vae.safetensors"
LATENT_CODEC = _WEIGHTS / "refrain_demo_latents.safetensors"

FLUX_HEADS, WAN_HEADS = 2, 4  # of their attention

PROMPTS = (
    "a big red ball at the center on a blue striped background",
    "a yellow star at the left and a white moon at the right on a purple tiled background",
    "a big banded green heart at the center on a white dotted background",
    "a red cube at the top and a cyan ring at the bottom on a yellow wavy background",
    "a big spotted orange ball at the right on a cyan lined background",
    "a blue cross at the left and an orange triangle at the top on a white checkered background",
    "a big purple star at the center on a green tiled background",
    "a white heart at the bottom and a green ball at the right on a red lined background",
)
