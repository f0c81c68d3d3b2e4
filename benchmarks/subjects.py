"""What the quality benchmark draws, and by which trained model.

In ComfyUI's Python cache_core can only be imported once ComfyUI was started, so this file imports late.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from quality_rows import Row


WEIGHTS = Path(__file__).resolve().parent / "weights"  # of the LoRAs for few steps


class Pictures:
    """128 x 128, by the tiny Flux."""

    name, file, title = "picture", "quality", "pictures"
    steps, guidance = 20, 3.0
    shifts = (1.0, 3.0, 6.0)  # of the flow's schedule
    multiplier = 1.0  # of the model's sigmas, as it counts them
    count = 16  # unless told

    def rows(self) -> list[Row]:
        """All that is compared with the uncached run."""
        import quality_rows

        return quality_rows.rows()

    def prompts(self, count: int) -> list[str]:
        """Those of the first pictures."""
        from cache_core.demo.still_life import prompt_of, random_still_life

        generator = random.Random(0)
        return [prompt_of(random_still_life(generator)) for _ in range(count)]

    def noise(self, seed: int) -> torch.Tensor:
        """The starting noise of one, (1, 16, 16, 16)."""
        from cache_core.demo.sampling import noise
        from cache_core.demo.still_life import SIZE

        return noise(seed, SIZE)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """The picture (1, 3, size, size) of a latent (16, size / 8, size / 8)."""
        from cache_core.demo.codec import decode

        return decode(latent[None])

    def load_in_comfyui(self) -> Any:
        """The MODEL."""
        from cache_core.adapters.comfyui.demo import load_model

        return load_model()

    def blocks_in_comfyui(self) -> tuple[type[torch.nn.Module], ...]:
        """The classes of its blocks."""
        from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock

        return DoubleStreamBlock, SingleStreamBlock

    def load_in_diffusers(self) -> torch.nn.Module:
        """The transformer."""
        from cache_core.demo.sampling import load_transformer

        return load_transformer()

    def parts_in_diffusers(self) -> dict[str, tuple[type[torch.nn.Module], ...]]:
        """The classes of its blocks and of its attentions."""
        from diffusers.models.transformers import transformer_flux as flux

        return {
            "blocks": (flux.FluxTransformerBlock, flux.FluxSingleTransformerBlock),
            "attentions": (flux.FluxAttention,),
        }

    def velocity(self) -> Callable:
        """One call of the transformer."""
        from cache_core.demo.sampling import velocity

        return velocity


class FewSteps(Pictures):
    """128 x 128, by the tiny Flux with a LoRA for 8 or 4 steps, without guidance."""

    shifts, guidance = (3.0,), 1.0

    def __init__(self, steps: int) -> None:
        self.steps, self.name, self.file = steps, f"few-steps-{steps}", f"few_steps_{steps}"
        self.title = f"pictures by the LoRA for {self._lora} steps"

    def rows(self) -> list[Row]:
        import few_step_rows

        return few_step_rows.rows(self.steps)

    def load_in_comfyui(self) -> Any:
        import comfy.sd
        import comfy.utils

        lora = comfy.utils.load_torch_file(str(self._file))
        return comfy.sd.load_lora_for_models(super().load_in_comfyui(), None, lora, 1.0, 0.0)[0]

    def load_in_diffusers(self) -> torch.nn.Module:
        transformer, lora = super().load_in_diffusers(), load_file(self._file)
        for key, down in lora.items():
            if (name := key.removesuffix(".lora_A.weight")) != key:
                layer = transformer.get_submodule(name.removeprefix("transformer."))
                layer.weight += lora[f"{name}.lora_B.weight"].float() @ down.float()
        return transformer

    @property
    def _lora(self) -> int:
        return 4 if self.steps <= 4 else 8

    @property
    def _file(self) -> Path:
        return WEIGHTS / f"{self._lora}_steps.safetensors"


class Videos(Pictures):
    """15 frames of 96 x 96, by the tiny Wan: 540 tokens, and more than half of the work is attention."""

    name, file, title = "video", "video", "videos"
    shifts = (3.0, 8.0)  # ComfyUI's own for Wan is 8
    multiplier = 1000.0
    count = 6

    def rows(self) -> list[Row]:
        import video_rows

        return video_rows.rows()

    def prompts(self, count: int) -> list[str]:
        from cache_core.demo.motion import prompt_of, random_clip

        generator = random.Random(0)
        return [prompt_of(random_clip(generator)) for _ in range(count)]

    def noise(self, seed: int) -> torch.Tensor:
        """The starting noise of one, (1, 16, 15, 12, 12)."""
        from cache_core.demo import wan

        return wan.noise(seed, wan.FRAMES, wan.SIZE)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """The frames (15, 3, 96, 96) of a latent (16, 15, 12, 12)."""
        from cache_core.demo.wan import decode

        return decode(latent[None])[0]

    def load_in_comfyui(self) -> Any:
        from cache_core.adapters.comfyui.demo import load_video_model

        return load_video_model()

    def blocks_in_comfyui(self) -> tuple[type[torch.nn.Module], ...]:
        from comfy.ldm.wan.model import WanAttentionBlock

        return (WanAttentionBlock,)

    def load_in_diffusers(self) -> torch.nn.Module:
        from cache_core.demo.wan import load_transformer

        return load_transformer()

    def parts_in_diffusers(self) -> dict[str, tuple[type[torch.nn.Module], ...]]:
        from diffusers.models.transformers import transformer_wan as wan

        return {"blocks": (wan.WanTransformerBlock,), "attentions": (wan.WanAttention,)}

    def velocity(self) -> Callable:
        from cache_core.demo.wan import velocity

        return velocity


SUBJECTS = {subject.name: subject for subject in (Pictures(), FewSteps(8), FewSteps(6), FewSteps(4), Videos())}
