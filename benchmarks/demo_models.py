"""The trained demo model in ComfyUI and in diffusers, ready to be sampled through any row, with a count of what ran."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from random_models import start_comfyui
from subjects import Pictures

if TYPE_CHECKING:
    from quality_rows import ComfyUICache, Row


class Tally:
    """What really ran since `clear`, in rows of the batch: blocks, and operations of attention."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.blocks = self.attentions = 0

    def count(self, name: str, *kinds: type[torch.nn.Module]) -> None:
        """From now on every run of a module of these classes counts, whoever asks for it."""
        for kind in kinds:
            kind.forward = self._counted(name, kind.forward)

    def _counted(self, name: str, forward: Any) -> Any:
        @functools.wraps(forward)
        def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            setattr(self, name, getattr(self, name) + len(next(tensors)))
            return forward(module, *args, **kwargs)

        return counted

    def attention(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's override of one attention operation, function(q, k, v, ...)."""
        self.attentions += len(args[0])
        return function(*args, **kwargs)


class InComfyUI:
    """Sampled as the KSampler node does."""

    def __init__(self, subject: Pictures | None = None) -> None:
        start_comfyui("cpu")
        from comfyui_version import __version__

        self.subject, self.name, self.tally = subject or Pictures(), f"ComfyUI {__version__}", Tally()
        self.model = self.subject.load_in_comfyui()
        self.model.model_options["transformer_options"]["optimized_attention_override"] = self.tally.attention
        self.tally.count("blocks", *self.subject.blocks_in_comfyui())

    @staticmethod
    def can_run(row: Row) -> bool:
        return True

    def sample(self, row: Row, shift: float, prompts: Sequence[str], noise: torch.Tensor) -> torch.Tensor:
        """Latents of the noise's shape, as the transformer knows them."""
        import comfy.sample

        model, empty = _with_row(self._shifted(shift), row), torch.zeros_like(noise)
        positive, negative = _conditioning(prompts), _conditioning([""] * len(prompts))
        settings = row.steps, self.subject.guidance, row.sampler, "simple"
        latent = comfy.sample.sample(model, noise, *settings, positive, negative, empty, seed=0, disable_pbar=True)
        return self.model.model.process_latent_in(latent)

    @functools.cache  # noqa: B019 - lives as long as the program
    def _shifted(self, shift: float) -> Any:
        from cache_core.adapters.comfyui.demo import shifted

        return shifted(self.model, shift, self.subject.multiplier)


def _with_row(model: Any, row: Row) -> Any:
    """The MODEL that comes out of the row's node."""
    from cache_core.adapters.comfyui import with_cache

    for strategy in filter(None, (row.strategy, row.then)):
        model = with_cache(model, strategy)
    return model if row.comfyui is None else _with_comfyui_cache(model, row.comfyui)


def _with_comfyui_cache(model: Any, cache: ComfyUICache) -> Any:
    """Through ComfyUI's own node, changed only from outside."""
    from comfy.patcher_extension import WrappersMP
    from comfy_extras import nodes_easycache

    if cache.handed_a_clone:
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "clone", _hand_a_clone)  # first in, so outside
    node = getattr(nodes_easycache, f"{cache.node}Node")
    (model,) = node.execute(model, cache.threshold, start_percent=0.15, end_percent=0.95, verbose=False).result
    if cache.reads_every_pixel:
        model.model_options["transformer_options"]["easycache"].subsample_factor = 1
    return model


def _hand_a_clone(executor: Any, latent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Around the diffusion model and EasyCache: what is inside may write into what it is given."""
    return executor(latent.clone(), *args, **kwargs)


def _conditioning(prompts: Sequence[str]) -> list:
    """One CONDITIONING whose batch is the prompts."""
    from cache_core.demo.sampling import encode_prompts

    tokens, pooled = encode_prompts(prompts)  # (prompts, 8, 96), (prompts, 96)
    return [[tokens, {"pooled_output": pooled}]]


class InDiffusers:
    """Sampled in a plain Euler loop."""

    def __init__(self, subject: Pictures | None = None) -> None:
        from diffusers import __version__

        self.subject, self.name, self.tally = subject or Pictures(), f"diffusers {__version__}", Tally()
        self.transformer = self.subject.load_in_diffusers()
        for name, classes in self.subject.parts_in_diffusers().items():
            self.tally.count(name, *classes)

    @staticmethod
    def can_run(row: Row) -> bool:
        """diffusers' Flux gives packed predictions, of which none is estimated; and ComfyUI's caches are ComfyUI's."""
        one = row.comfyui is None and row.then is None and row.sampler == "euler"
        return one and (row.strategy is None or "guidance" not in row.strategy.levels)

    def sample(self, row: Row, shift: float, prompts: Sequence[str], noise: torch.Tensor) -> torch.Tensor:
        """Latents of the noise's shape, as the transformer knows them."""
        from cache_core.demo.sampling import flow_sigmas
        from cache_core.demo.with_diffusers import denoised

        sigmas = flow_sigmas(row.steps, shift)
        return denoised(
            self.transformer, row.strategy, prompts, noise, sigmas, self.subject.guidance, self.subject.velocity()
        )[0]
