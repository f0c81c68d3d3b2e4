"""Eight tiny transformers of diffusers from config, and the loops their pipelines run, with real schedulers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache_core.adapters.diffusers import cache_context

diffusers = pytest.importorskip("diffusers", reason="parity is with diffusers, which is not installed")
if diffusers.__version__ != "0.42.1":
    pytest.skip(f"parity is with diffusers 0.42.1, this is {diffusers.__version__}", allow_module_level=True)
diffusers.utils.logging.set_verbosity_error()

STEPS = 20
TEXT_TOKENS = 6
TEXT_WIDTH = 32
GUIDANCE = 4.0
Inputs = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]  # (latent, text, timestep), batched alike -> the model's


def flow_match() -> Any:
    """Used by most: sigma from 1 to 0, and the timestep is a thousand times that."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def ddim() -> Any:
    """CogVideoX's."""
    return diffusers.CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def unipc() -> Any:
    """Wan's: a multistep solver."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@dataclass(frozen=True)
class Denoiser:
    """A model and how its pipeline calls it."""

    name: str
    model: Callable[[], nn.Module]
    latent: tuple[int, ...]  # of one branch
    inputs: Inputs
    scheduler: Callable[[], Any] = flow_match
    branches: str = "one"  # "one" guidance-distilled, "joined" [uncond, cond] in a batch, "apart" in two calls


@dataclass
class Clock:
    """Where a pipeline is, for the callbacks of the configs."""

    step: int = 0
    timestep: Any = None

    def __call__(self) -> Any:
        return self.timestep


def tiny(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Makes a transformer of diffusers on 4 channels, with two heads."""
    shared = dict(in_channels=4, num_attention_heads=2, attention_head_dim=16)
    return lambda: getattr(diffusers, name)(**shared, **settings)


def _masked(text: Tensor) -> Tensor:
    return torch.ones(text.shape[:2], dtype=torch.bool)


def _flux(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    return dict(
        hidden_states=latent,
        encoder_hidden_states=text,
        pooled_projections=text.mean(dim=1),
        timestep=timestep / 1000,
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(6.0)).to(latent.dtype),
        txt_ids=torch.zeros(text.shape[1], 3, dtype=latent.dtype),
        guidance=torch.full((latent.shape[0],), 3.5, dtype=latent.dtype),
    )


def _video(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    return dict(hidden_states=latent, encoder_hidden_states=text, timestep=timestep)


def _masked_video(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    return _video(latent, text, timestep) | dict(encoder_attention_mask=_masked(text))


def _flux2(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    inputs = _flux(latent, text, timestep)
    del inputs["pooled_projections"]
    ids = {name: torch.nn.functional.pad(inputs[name], (0, 1)) for name in ("img_ids", "txt_ids")}
    return inputs | ids


def _sd3(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    return _video(latent, text, timestep) | dict(pooled_projections=text.mean(dim=1))


def _hunyuan(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    guidance = torch.full((latent.shape[0],), 6000.0, dtype=latent.dtype)
    pooled = text.mean(dim=1)
    return _masked_video(latent, text, timestep) | dict(pooled_projections=pooled, guidance=guidance)


def _ltx(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    return _masked_video(latent, text, timestep) | dict(num_frames=2, height=4, width=4)


def _qwen(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    shapes = [[(1, 6, 6)]] * latent.shape[0]
    return _video(latent, text, timestep / 1000) | dict(encoder_hidden_states_mask=_masked(text), img_shapes=shapes)


def _cogview(latent: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
    size = torch.tensor([[64.0, 64.0]], dtype=latent.dtype).expand(latent.shape[0], 2)
    return _video(latent, text, timestep) | dict(original_size=size, target_size=size, crop_coords=size * 0)


FLUX = Denoiser(
    "Flux",
    tiny(
        "FluxTransformer2DModel",
        patch_size=1,
        num_layers=3,
        num_single_layers=3,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    ),
    latent=(1, 36, 4),
    inputs=_flux,
)
COGVIDEOX = Denoiser(
    "CogVideoX",
    tiny(
        "CogVideoXTransformer3DModel",
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT_WIDTH,
        num_layers=4,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT_TOKENS,
    ),
    latent=(1, 3, 4, 8, 8),
    inputs=_video,
    scheduler=ddim,
    branches="joined",
)
WAN_SETTINGS = dict(out_channels=4, text_dim=TEXT_WIDTH, freq_dim=32, ffn_dim=64, num_layers=4, rope_max_seq_len=32)
WAN = Denoiser(
    "Wan",
    tiny("WanTransformer3DModel", **WAN_SETTINGS),
    latent=(1, 4, 2, 8, 8),
    inputs=_video,
    scheduler=unipc,
    branches="apart",
)
WAN_JOINED = replace(WAN, name="WanJoined", branches="joined")
WAN_VACE = replace(
    WAN,
    name="WanVACE",
    model=tiny("WanVACETransformer3DModel", **WAN_SETTINGS, vace_layers=[0, 2], vace_in_channels=12),
)
HUNYUAN_VIDEO = Denoiser(
    "HunyuanVideo",
    tiny(
        "HunyuanVideoTransformer3DModel",
        out_channels=4,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 4, 8),
    ),
    latent=(1, 4, 2, 8, 8),
    inputs=_hunyuan,
)
LTX = Denoiser(
    "LTX",
    tiny(
        "LTXVideoTransformer3DModel",
        out_channels=4,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
        num_layers=4,
    ),
    latent=(1, 32, 4),
    inputs=_ltx,
    branches="joined",
)
MOCHI = Denoiser(
    "Mochi",
    tiny(
        "MochiTransformer3DModel",
        num_layers=4,
        pooled_projection_dim=16,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=4,
        max_sequence_length=TEXT_TOKENS,
    ),
    latent=(1, 4, 2, 8, 8),
    inputs=_masked_video,
    branches="joined",
)
QWEN_IMAGE = Denoiser(
    "QwenImage",
    tiny(
        "QwenImageTransformer2DModel",
        patch_size=2,
        out_channels=1,
        num_layers=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
    ),
    latent=(1, 36, 4),
    inputs=_qwen,
    branches="apart",
)
COGVIEW4 = Denoiser(
    "CogView4",
    tiny(
        "CogView4Transformer2DModel",
        out_channels=4,
        num_layers=4,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(8, 8),
    ),
    latent=(1, 4, 8, 8),
    inputs=_cogview,
    branches="apart",
)
LATTE = Denoiser(  # blocks for space and blocks for time
    "Latte",
    tiny(
        "LatteTransformer3DModel",
        out_channels=4,
        num_layers=3,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=TEXT_WIDTH,
        video_length=2,
    ),
    latent=(1, 4, 2, 8, 8),
    inputs=_video,
    scheduler=lambda: diffusers.DDIMScheduler(timestep_spacing="trailing"),
    branches="joined",
)
FLUX2 = Denoiser(
    "Flux2",
    tiny(
        "Flux2Transformer2DModel",
        num_layers=3,
        num_single_layers=3,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ),
    latent=(1, 36, 4),
    inputs=_flux2,
)
SD3 = Denoiser(  # has no CacheMixin
    "SD3",
    tiny(
        "SD3Transformer2DModel",
        sample_size=8,
        out_channels=4,
        num_layers=3,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=8,
    ),
    latent=(1, 4, 8, 8),
    inputs=_sd3,
    branches="joined",
)
CHROMA = Denoiser(  # its blocks are not in diffusers' list
    "Chroma",
    tiny(
        "ChromaTransformer2DModel",
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ),
    latent=(1, 36, 4),
    inputs=_flux,
)
DENOISERS = [FLUX, COGVIDEOX, WAN, HUNYUAN_VIDEO, LTX, MOCHI, QWEN_IMAGE, COGVIEW4]


def made(denoiser: Denoiser, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with weights of seed 0."""
    torch.manual_seed(0)
    return denoiser.model().eval().to(dtype)


def called(model: nn.Module, denoiser: Denoiser, timestep: float = 500.0, text: Tensor | None = None) -> Tensor:
    """What one call gives by itself, on a latent of zeros."""
    text = torch.ones(1, TEXT_TOKENS, TEXT_WIDTH) if text is None else text
    return model(**denoiser.inputs(torch.zeros(denoiser.latent), text, torch.tensor([float(timestep)])))


def without_context(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """For loops that do not say which branch a call is."""
    return nullcontext()


def denoise(
    denoiser: Denoiser,
    model: nn.Module,
    clock: Clock,
    steps: int = STEPS,
    seed: int = 1,
    shape: tuple[int, ...] | None = None,
    seen: Callable[[int, str, Tensor], None] = lambda step, branch, output: None,
    stop_after: int | None = None,
    context: Callable[[nn.Module, str], AbstractContextManager[None]] | None = None,
) -> Tensor:
    """One sampling run as the model's pipeline makes it. `seen` is shown every output. Returns the final latent."""
    dtype = next(model.parameters()).dtype
    context = context or (type(model).cache_context if hasattr(model, "cache_context") else cache_context)
    random = torch.Generator().manual_seed(seed)
    text = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=random).to(dtype)  # uncond, cond
    latent = torch.randn(shape or denoiser.latent, generator=random)
    scheduler = denoiser.scheduler()
    scheduler.set_timesteps(steps)

    def predict(branch: str, latent: Tensor, text: Tensor) -> Tensor:
        with context(model, branch):
            inputs = denoiser.inputs(latent.to(dtype), text, clock.timestep.expand(latent.shape[0]).to(torch.float32))
            inputs["timestep"] = inputs["timestep"].to(dtype)
            output = model(**inputs, return_dict=False)[0]
        seen(clock.step, branch, output)
        return output.float()

    for clock.step, clock.timestep in enumerate(scheduler.timesteps[:stop_after]):
        if denoiser.branches == "one":
            prediction = predict("cond", latent, text[1:])
        elif denoiser.branches == "joined":
            without, given = predict("cond_uncond", latent.repeat_interleave(2, dim=0), text).chunk(2)
            prediction = without + GUIDANCE * (given - without)
        else:
            given = predict("cond", latent, text[1:])
            without = predict("uncond", latent, text[:1])
            prediction = without + GUIDANCE * (given - without)
        latent = scheduler.step(prediction, clock.timestep, latent, return_dict=False)[0]
    return latent
