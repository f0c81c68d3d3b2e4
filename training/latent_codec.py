"""Fits the linear latent codec to new pictures.

python -m training.latent_codec --out codec.safetensors

Principal components of 8 x 8 x 3 patches, half whitened: a component's spread becomes the square root of what it was.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from cache_core.demo.sampling import LATENT_CHANNELS

from .data import random_pictures


def sample_patches(batches: int, seed: int = 1) -> Tensor:
    """Patches (batches * 4000, 192) in -1..1 of new pictures, 128 pixels wide so that edges are smooth."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    kept = []
    for _ in range(batches):
        pictures, _ = random_pictures(32, chance, size=128)
        patches = rearrange(pictures * 2 - 1, "batch color (h p) (w q) -> (batch h w) (color p q)", p=8, q=8)
        kept.append(patches[torch.randperm(len(patches))[:4000]])
    return torch.cat(kept)


def fit(patches: Tensor, channels: int = LATENT_CHANNELS) -> dict[str, Tensor]:
    """mean (192,), encoder (channels, 192) and decoder (192, channels); latents have a spread of 1 on the whole."""
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))  # smallest first
    spread = variances.flip(0)[:channels].sqrt()
    directions = directions.flip(1)[:, :channels]
    whitening = spread.sqrt()
    whitening = whitening * (spread / whitening).square().mean().sqrt()
    return {
        "mean": mean,
        "encoder": (directions / whitening).T.contiguous(),
        "decoder": (directions * whitening).contiguous(),
    }


def decibels(codec: dict[str, Tensor], patches: Tensor) -> float:
    """PSNR of patches after encoding and decoding; their range is 2."""
    latents = (patches - codec["mean"]) @ codec["encoder"].T
    error = (latents @ codec["decoder"].T + codec["mean"] - patches).square().mean().item()
    return 10 * math.log10(4 / error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    patches = sample_patches(arguments.batches)
    unseen = sample_patches(1, seed=2)
    for channels in (4, 8, LATENT_CHANNELS):
        print(f"{channels} channels: {decibels(fit(patches, channels), unseen):.1f} dB on unseen patches")
    save_file(fit(patches), arguments.out, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
