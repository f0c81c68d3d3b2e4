"""The demo's weights and words as ComfyUI's own MODEL, CLIP and VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import comfy.model_detection
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor, nn

from ...demo import FLUX_HEADS, FLUX_WEIGHTS, VAE_WEIGHTS, WAN_HEADS, WAN_WEIGHTS, words
from ...presets import DEMO, VIDEO_DEMO
from . import families


def load_model() -> ModelPatcher:
    """The tiny Flux, as the stock diffusion model loader would load it."""
    weights = comfy.utils.load_torch_file(str(FLUX_WEIGHTS))
    try:
        model = comfy.sd.load_diffusion_model_state_dict(weights)
    except ValueError:  # ComfyUI 0.8: takes every Flux to have 24 heads
        model = None
    if model is None:
        found = comfy.model_detection.convert_diffusers_mmdit(comfy.utils.load_torch_file(str(FLUX_WEIGHTS)), "")
        model = _load(found, num_heads=FLUX_HEADS)
    model.set_attachments(families.KEY, DEMO)  # it is no Flux.1, for which others published settings
    return model


def load_video_model() -> ModelPatcher:
    """The tiny Wan. Stock loaders read what its weights do not tell from the file's metadata, but for ComfyUI 0.8's."""
    model = _load(comfy.utils.load_torch_file(str(WAN_WEIGHTS)), num_heads=WAN_HEADS, text_dim=words.TOKEN_WIDTH)
    model.set_attachments(families.KEY, VIDEO_DEMO)  # nor is it the Wan for which others published settings
    return model


def load_clip() -> comfy.sd.CLIP:
    """The word-hash text encoder, usable with the stock CLIP nodes."""
    return comfy.sd.CLIP(_Target)


def load_vae() -> comfy.sd.VAE:
    """The tiny VAE, as the stock VAE loader would load it."""
    return _load_vae(comfy.sd.VAE)


def load_video_vae() -> comfy.sd.VAE:
    """The same for the tiny Wan's latents. The stock one decodes the first frame of a video only."""

    class VideoVAE(_FrameByFrame, comfy.sd.VAE):
        pass

    return _load_vae(VideoVAE)


def shifted(model: ModelPatcher, shift: float, multiplier: float = 1.0) -> ModelPatcher:
    """The model with a flow shift, as stock ModelSamplingAuraFlow gives it; the multiplier 1 is the tiny Flux's."""

    class Shifted(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    patched, sampling = model.clone(), Shifted(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=multiplier)
    patched.add_object_patch("model_sampling", sampling)
    return patched


def sample(
    model: ModelPatcher,
    clip: comfy.sd.CLIP,
    prompts: Sequence[str],
    *,
    seed: int = 1,
    steps: int = 20,
    cfg: float = 3.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    latent: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Latents (prompts, 16, 8, 8) of all prompts in one batch, the first with this seed, each other with the next.

    What the KSampler node does. `options` are those of comfy.sample.sample; a prompt's picture does not depend on the
    others beyond rounding.
    """
    seeds = range(seed, seed + len(prompts))
    noise = torch.cat([comfy.sample.prepare_noise(torch.zeros(1, 16, 8, 8), own) for own in seeds])
    start = torch.zeros_like(noise) if latent is None else latent
    positive, negative = _conditioning(clip, prompts), _conditioning(clip, [""])
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, start, seed=seed, disable_pbar=True, **options
    )


def _conditioning(clip: comfy.sd.CLIP, prompts: Sequence[str]) -> list:
    """One CONDITIONING whose batch is the prompts."""
    entries = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0] for prompt in prompts]
    pooled = torch.cat([extra["pooled_output"] for _, extra in entries])
    return [[torch.cat([tokens for tokens, _ in entries]), {**entries[0][1], "pooled_output": pooled}]]


def _load(weights: dict[str, torch.Tensor], **told: Any) -> ModelPatcher:
    """What the stock loader makes of them, told of the configuration what it would guess wrong."""
    config = comfy.model_detection.detect_unet_config(weights, "") | told
    model_config = comfy.model_detection.model_config_from_unet_config(config, weights)
    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(device=device, supported_dtypes=model_config.supported_inference_dtypes)
    model_config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device))
    model = model_config.get_model(weights, "")
    model.load_model_weights(weights, "")
    offload_device = comfy.model_management.unet_offload_device()
    return ModelPatcher(model.to(offload_device), device, offload_device)


def _load_vae(kind: type[comfy.sd.VAE]) -> comfy.sd.VAE:
    vae = kind(sd=comfy.utils.load_torch_file(str(VAE_WEIGHTS)))
    vae.throw_exception_if_invalid()
    return vae


class _FrameByFrame:
    """Before ComfyUI's VAE of pictures: the frames of videos are so many pictures to it."""

    def decode(self, samples_in: Tensor, *args: Any, **options: Any) -> Tensor:
        return _decoded(super().decode, samples_in, *args, **options)

    def decode_tiled(self, samples: Tensor, *args: Any, **options: Any) -> Tensor:
        return _decoded(super().decode_tiled, samples, *args, **options)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        return _encoded(super().encode, pixel_samples)

    def encode_tiled(self, pixel_samples: Tensor, *args: Any, **options: Any) -> Tensor:
        return _encoded(super().encode_tiled, pixel_samples, *args, **options)


def _decoded(decode: Callable[..., Tensor], latents: Tensor, *args: Any, **options: Any) -> Tensor:
    """Videos (batch, frames, height, width, 3) of latents (batch, 16, frames, h, w); pictures of pictures' latents."""
    if latents.ndim == 4:
        return decode(latents, *args, **options)
    pictures = decode(rearrange(latents, "batch c frames h w -> (batch frames) c h w"), *args, **options)
    return rearrange(pictures, "(batch frames) h w color -> batch frames h w color", batch=len(latents))


def _encoded(encode: Callable[..., Tensor], pictures: Tensor, *args: Any, **options: Any) -> Tensor:
    """Latents of videos. Pictures (frames, height, width, 3) are one video, as to ComfyUI's VAEs of videos."""
    videos = pictures if pictures.ndim == 5 else pictures[None]
    latents = encode(rearrange(videos, "batch frames h w color -> (batch frames) h w color"), *args, **options)
    return rearrange(latents, "(batch frames) c h w -> batch c frames h w", batch=len(videos))


class _Tokenizer:
    """ComfyUI's tokenizer interface around words that need no vocabulary."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, list]:
        return {"refrain": [[(text, 1.0)]]}

    def untokenize(self, tokens: list) -> list:
        return tokens

    def state_dict(self) -> dict:
        return {}


class _TextEncoder(nn.Module):
    """ComfyUI's text encoder interface around `words.encode`; it has no weights."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__()
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_of_text, pooled = words.encode(tokens["refrain"][0][0][0])
        return tokens_of_text[None], pooled[None]  # (1, 8, 96), (1, 96)

    def load_sd(self, weights: dict) -> tuple[list, list]:
        return [], []


class _Target:
    """What comfy.sd.CLIP makes its tokenizer and text encoder from."""

    params: ClassVar[dict[str, Any]] = {}
    clip = _TextEncoder
    tokenizer = _Tokenizer
