"""A tiny trained Flux and a tiny trained Wan, small enough to ship: real caching on a CPU, without a download."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"

FLUX_WEIGHTS = _WEIGHTS / "refrain_demo_flux.safetensors"
FEW_STEP_LORAS = {steps: _WEIGHTS / f"refrain_demo_{steps}_steps.safetensors" for steps in (8, 4)}
WAN_WEIGHTS = _WEIGHTS / "refrain_demo_wan.safetensors"
VAE_WEIGHTS = _WEIGHTS / "refrain_demo_vae.safetensors"
LATENT_CODEC = _WEIGHTS / "refrain_demo_latents.safetensors"

FLUX_HEADS, WAN_HEADS = 2, 4  # of their attention

PROMPTS = (
    "a big red ball at the center on a blue striped background",
    "a big yellow star at the left on a purple plain background",
    "a small green cube at the right on a white checkered background",
    "a big cyan heart at the center on a red dotted background",
    "a big white ring at the top on a green wavy background",
    "a big orange cross at the bottom on a cyan plain background",
    "a small purple moon at the center on a yellow striped background",
    "a big blue triangle at the center on an orange plain background",
)
