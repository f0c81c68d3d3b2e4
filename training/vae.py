"""Trains the VAE to imitate the linear codec.

python -m training.vae --seconds 600 --out vae.safetensors

The seconds are for the decoder, then again for the encoder.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from cache_core.demo import codec
from cache_core.demo.sampling import LATENT_CHANNELS

from .clock import LossLog, until
from .data import random_pictures

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

LATENT_SCALE = 0.4  # TAESD clamps what it decodes at 3; our latents reach 9, few of them above 6


def new_vae() -> AutoencoderTiny:
    """An untrained VAE whose blocks begin close to passing on what they get."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(latent_channels=LATENT_CHANNELS, scaling_factor=1 / LATENT_SCALE)
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if name.endswith("conv.4.weight"):
                weight *= 0.1
    return vae.to(memory_format=torch.channels_last)


def train(part: nn.Module, name: str, seconds: float, rate: float, bfloat16: bool = False, seed: int = 0) -> None:
    """Trains vae.decoder (latents to pictures) or vae.encoder (pictures to latents)."""
    chance = random.Random(seed)
    optimizer = torch.optim.AdamW(part.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    with LossLog(name) as log:
        for step, progress in enumerate(until(seconds)):
            pictures, _ = random_pictures(16, chance)
            given, wanted = codec.encode(pictures) * LATENT_SCALE, pictures * 2 - 1
            if name == "encoder":
                given, wanted = wanted, given
            optimizer.param_groups[0]["lr"] = rate * _rate_factor(step, progress)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                made = part(given.contiguous(memory_format=torch.channels_last)).float()
            log.add(_improve(part, optimizer, made, wanted))


def export(vae: AutoencoderTiny, path: Path) -> None:
    """Writes the VAE in the layout of TAESD, which ComfyUI's VAELoader reads."""
    stored = {codec.taesd_key(name): weight.half().contiguous() for name, weight in vae.state_dict().items()}
    stored["vae_scale"] = torch.tensor(codec.FLUX_SCALE * LATENT_SCALE)
    stored["vae_shift"] = torch.tensor(codec.FLUX_SHIFT)
    save_file(stored, path, metadata={"format": "pt"})


def _improve(part: nn.Module, optimizer: torch.optim.Optimizer, made: Tensor, wanted: Tensor) -> float:
    loss = functional.l1_loss(made, wanted) + functional.mse_loss(made, wanted)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(part.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _rate_factor(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / 30) * max(0.02, (math.cos(math.pi * progress) + 1) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bfloat16", action="store_true", help="faster, on processors with bfloat16 units only")
    arguments = parser.parse_args()
    torch.manual_seed(4)
    vae = new_vae()
    train(vae.decoder, "decoder", arguments.seconds, rate=1e-3, bfloat16=arguments.bfloat16)
    train(vae.encoder, "encoder", arguments.seconds, rate=1.5e-3, bfloat16=arguments.bfloat16)
    export(vae, arguments.out)


if __name__ == "__main__":
    main()
