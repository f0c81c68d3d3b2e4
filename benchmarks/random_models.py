"""ComfyUI's own models in any size, filled with random numbers: they cost what trained ones cost, and draw noise."""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 2 * 2**30  # bytes left to CUDA itself, cuBLAS workspaces and fragmentation


def _register(name: str, folder: Path) -> None:
    """Make one package importable; the repository itself must stay off sys.path: its `nodes` would hide ComfyUI's."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def start_comfyui(device: str) -> None:
    """ComfyUI's modules in this process, on this device, with all weights kept there."""
    _register("cache_core", ROOT / "cache_core")
    from cache_core.demo.server import find_comfyui

    found = find_comfyui()
    if found is None:
        raise SystemExit("No ComfyUI found. Set COMFYUI_PATH to its folder and COMFYUI_PYTHON to its Python.")
    sys.path.insert(0, str(found[0]))
    try:
        from comfy.cli_args import args

        args.cpu, args.highvram = device == "cpu", device != "cpu"
        import comfy.sample
        import comfy.sd  # noqa: F401  (sets up what comfy.sample leaves to others)
    except ImportError as error:
        raise SystemExit(f"This Python can't import ComfyUI ({error}). Run the benchmark with {found[1]}.") from None
    import torch

    logging.getLogger().setLevel(logging.WARNING)
    torch.set_grad_enabled(False)


@dataclass(frozen=True)
class Shape:
    """One model and what it is asked to draw."""

    name: str
    config: str  # class in comfy.supported_models
    unet: dict[str, Any]
    latent: tuple[int, ...]  # (batch, channels, [frames,] height, width)
    text: tuple[int, int]  # (tokens, channels)
    pooled: int  # channels of the pooled text; 0 for models without it
    dtype: str

    @property
    def tokens(self) -> int:
        """Of picture and text: a patch is 2 by 2 latent pixels."""
        frames = self.latent[2] if len(self.latent) == 5 else 1
        return frames * self.latent[-2] * self.latent[-1] // 4 + self.text[0]

    @property
    def blocks(self) -> int:
        return sum(self.unet[name] for name in _depths(self.unet))


def _flux(hidden: int, depth: int, single: int, text: int, pooled: int) -> dict[str, Any]:
    return dict(
        image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=pooled, context_in_dim=text,
        hidden_size=hidden, mlp_ratio=4.0, num_heads=hidden // 128, depth=depth, depth_single_blocks=single,
        axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
    )  # fmt: skip


def _wan(dim: int, ffn: int, layers: int, text: int) -> dict[str, Any]:
    return dict(
        image_model="wan2.1", model_type="t2v", patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True,
        cross_attn_norm=True, eps=1e-6, in_dim=16, out_dim=16, dim=dim, ffn_dim=ffn, num_heads=dim // 128,
        num_layers=layers, text_dim=text,
    )  # fmt: skip


SHAPES = {
    "small": Shape("small", "Flux", _flux(1024, 4, 8, 512, 256), (1, 16, 64, 64), (64, 512), 256, "float32"),
    "flux": Shape("flux", "Flux", _flux(3072, 19, 38, 4096, 768), (1, 16, 128, 128), (512, 4096), 768, "bfloat16"),
    "wan": Shape("wan", "WAN21_T2V", _wan(5120, 13824, 40, 4096), (1, 16, 21, 60, 104), (512, 4096), 0, "bfloat16"),
}
TINY = {  # the same code paths in a second or two; the times mean nothing
    "small": replace(SHAPES["small"], unet=_flux(256, 2, 3, 64, 64), latent=(1, 16, 16, 16), text=(16, 64), pooled=64),
    "flux": replace(SHAPES["flux"], unet=_flux(256, 2, 3, 64, 64), latent=(1, 16, 16, 16), text=(16, 64), pooled=64),
    "wan": replace(SHAPES["wan"], unet=_wan(256, 512, 4, 64), latent=(1, 16, 3, 16, 16), text=(16, 64)),
}


def load(shape: Shape, device: str) -> tuple[Any, Shape]:
    """A ModelPatcher whose weights were made on the device, with as many blocks as fit there, and the shape it has.

    Matrices are normal with a variance of 1 / inputs and norms are 1, so that what a block is given and what it adds
    are of one size: no overflow in any dtype, and features that change from step to step.
    """
    import comfy.model_management
    import comfy.model_patcher
    import torch

    home = comfy.model_management.get_torch_device()
    dtype = torch.float32 if device == "cpu" else getattr(torch, shape.dtype)
    if device != "cpu":
        shape = _fitting(shape, dtype, torch.cuda.mem_get_info()[0])
    model = _build(shape, dtype, home)
    generator = torch.Generator(home).manual_seed(0)
    for name, parameter in model.diffusion_model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return comfy.model_patcher.ModelPatcher(model, load_device=home, offload_device=home), shape


def _build(shape: Shape, dtype: Any, device: Any) -> Any:
    import comfy.supported_models

    config = getattr(comfy.supported_models, shape.config)(dict(shape.unet))
    config.set_inference_dtype(dtype, None)
    return config.get_model({}, "", device=device)


def _depths(unet: dict[str, Any]) -> tuple[str, ...]:
    return ("depth", "depth_single_blocks") if "depth" in unet else ("num_layers",)


def _fitting(shape: Shape, dtype: Any, free: int) -> Shape:
    """The shape, with fewer blocks if the weights, one block's work and the features kept would not fit into memory."""
    model = _build(shape, dtype, "meta").diffusion_model
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    width = shape.unet.get("hidden_size") or shape.unet["dim"]
    # 30 hidden states: queries, keys, values, both sides of the feed-forward (about 8), and about 10 kept by a strategy
    left = free - RESERVE - 30 * shape.tokens * width * dtype.itemsize
    if weights <= left:
        return shape
    share = max(left, 0) / weights
    fewer = {name: max(2, int(shape.unet[name] * share)) for name in _depths(shape.unet)}
    return replace(shape, unet=shape.unet | fewer)
