"""Sampling with the tiny Flux through diffusers: transformer, schedule, guidance and Euler steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from einops import rearrange, repeat
from safetensors.torch import load_file
from torch import Tensor, nn

from . import FLUX_HEADS, FLUX_WEIGHTS, words

Velocity = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]
Predict = Callable[[Tensor, float], Tensor]
CallContext = Callable[[str], AbstractContextManager]

LATENT_CHANNELS = 16
TRAINED_TIMESTEPS = 1000  # ComfyUI reads its schedules off a table of this many sigmas

TRANSFORMER_CONFIG = {
    "patch_size": 1,
    "in_channels": 64,  # 16 latent channels in 2 x 2 patches
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 128,
    "num_attention_heads": FLUX_HEADS,
    "joint_attention_dim": words.TOKEN_WIDTH,
    "pooled_projection_dim": words.TOKEN_WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}


def load_transformer(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """The demo's transformer with its trained weights, ready to predict."""
    from diffusers import FluxTransformer2DModel

    weights = {name: weight.to(dtype) for name, weight in load_file(FLUX_WEIGHTS, device=str(device)).items()}
    with torch.device("meta"):  # no random start: every weight is in the file
        transformer = FluxTransformer2DModel(**TRANSFORMER_CONFIG)
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval().requires_grad_(False)


def noise(seed: int, size: int = 64) -> Tensor:
    """The starting noise of one picture of size x size pixels, (1, 16, size / 8, size / 8), as ComfyUI makes it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, LATENT_CHANNELS, size // 8, size // 8, generator=generator)


def flow_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """steps + 1 sigmas from 1 to 0: ComfyUI's "simple" schedule, shifted as its ModelSamplingAuraFlow does.

    >>> flow_sigmas(4)
    tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
    """
    passed = torch.tensor([int(index * (TRAINED_TIMESTEPS / steps)) for index in range(steps)])
    progress_left = (TRAINED_TIMESTEPS - passed) / TRAINED_TIMESTEPS
    return torch.cat([shifted(progress_left, shift), torch.zeros(1)])


def shifted(left: Tensor, shift: float) -> Tensor:
    """The sigma at which this share of an even schedule is left, with a flow shift."""
    return shift * left / (1 + (shift - 1) * left)


@torch.no_grad()
def denoise(predict: Predict, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Euler's method from noise to the clean latent, along predict(latent, sigma) -> velocity."""
    latent = noise * sigmas[0].item()
    for sigma, next_sigma in pairwise(sigmas.tolist()):
        latent = latent + (next_sigma - sigma) * predict(latent, sigma)
    return latent


def encode_prompts(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens (batch, 8, 96) and pooled (batch, 96) of several prompts."""
    tokens, pooled = zip(*map(words.encode, prompts), strict=True)
    return torch.stack(tokens), torch.stack(pooled)


def velocity(transformer: nn.Module, latent: Tensor, sigmas: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    """One call of the transformer: noise - picture at latent (batch, 16, h, w), in the latent's own dtype."""
    kind = {"device": latent.device, "dtype": transformer.dtype}
    height, width = latent.shape[-2] // 2, latent.shape[-1] // 2
    packed = transformer(
        hidden_states=rearrange(latent, "batch c (h p) (w q) -> batch (h w) (c p q)", p=2, q=2).to(**kind),
        encoder_hidden_states=tokens.to(**kind),
        pooled_projections=pooled.to(**kind),
        timestep=sigmas.to(latent.device),
        img_ids=_image_ids(height, width).to(latent.device),
        txt_ids=torch.zeros(tokens.shape[1], 3, device=latent.device),
        return_dict=False,
    )[0]
    unpacked = rearrange(packed, "batch (h w) (c p q) -> batch c (h p) (w q)", h=height, p=2, q=2)
    return unpacked.to(latent.dtype)


class GuidedPrediction:
    """predict(latent, sigma) of a transformer for prompts, with classifier-free guidance.

    joined calls the transformer once, on [uncond, cond] in one batch; otherwise first on uncond, then on cond.
    A scale of 1 needs cond only. call_context(name) is entered around each call of the transformer; name is "uncond",
    "cond", or "cond_uncond" for both in one batch, as in diffusers' pipelines. velocity is one call of it.
    """

    def __init__(
        self,
        transformer: nn.Module,
        prompts: Sequence[str],
        scale: float = 3.0,
        joined: bool = True,
        call_context: CallContext = nullcontext,
        velocity: Velocity = velocity,
    ) -> None:
        self.transformer = transformer
        self.velocity = velocity
        uncond, cond = encode_prompts([""] * len(prompts)), encode_prompts(prompts)
        both = tuple(map(torch.cat, zip(uncond, cond, strict=True)))
        self.texts = {"uncond": uncond, "cond": cond, "cond_uncond": both}
        self.scale = scale
        self.joined = joined
        self.call_context = call_context

    def __call__(self, latent: Tensor, sigma: float) -> Tensor:
        if self.scale == 1.0:
            return self._velocity(latent, sigma, "cond")
        if self.joined:
            uncond, cond = self._velocity(torch.cat([latent, latent]), sigma, "cond_uncond").chunk(2)
        else:
            uncond = self._velocity(latent, sigma, "uncond")
            cond = self._velocity(latent, sigma, "cond")
        return uncond + self.scale * (cond - uncond)

    def _velocity(self, latent: Tensor, sigma: float, name: str) -> Tensor:
        with self.call_context(name):
            return self.velocity(self.transformer, latent, torch.full((len(latent),), sigma), *self.texts[name])


def _image_ids(height: int, width: int) -> Tensor:
    rows = repeat(torch.arange(height), "h -> (h w)", w=width)
    columns = repeat(torch.arange(width), "w -> (h w)", h=height)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).float()  # (tokens, 3)
