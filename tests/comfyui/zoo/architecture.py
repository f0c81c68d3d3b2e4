"""What an architecture of the zoo is, how it is built and how it is sampled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .weights import fill

NEWEST = (0, 33)
TEXT = 7  # tokens of every prompt, unless an architecture needs another number


class Draw:
    """Random tensors of one generator: the same every time."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """Normal floats."""
        return torch.randn(*shape, generator=self._generator)

    def whole(self, below: int, *shape: int) -> Tensor:
        """Whole numbers from 0 up."""
        return torch.randint(below, shape, generator=self._generator)


@dataclass(frozen=True, eq=False)
class Architecture:
    """One architecture: its configuration, what it is given, and what discovery must find in it."""

    name: str  # as in docs/models.md
    covers: str  # the file under comfy/ldm that holds the model's class: every file that has one must be covered
    config: str  # class in comfy.supported_models
    unet: dict[str, Any]  # the unet_config that class is given
    latent: tuple  # its shape; for a nested latent a tuple of shapes
    prompt: Callable[[Draw], list]  # [[context, {extra conditioning}]] as a node's CONDITIONING; called for each branch
    chains: tuple[str, ...]  # lists of blocks that are cached, in the order they run; the first leads. () is none
    attention: tuple[str, ...] = ()  # kinds of attention that are cached
    live: tuple[str, ...] = ()  # lists of blocks that always run, though they look like chains
    is_detected: bool = False  # built from a state dict by ComfyUI's loader, as Load Diffusion Model does
    metadata: dict[str, str] | None = None  # of the safetensors file, for the loader
    prepare: Callable[[nn.Module], None] | None = None  # last changes to the diffusion model after it was filled
    beside: Callable[[Draw], dict[str, Tensor]] | None = None  # what else its checkpoint holds
    shrunk: Callable[[], AbstractContextManager] = nullcontext  # while it is built, if its class fixes real sizes
    is_slow: bool = False
    note: str = ""  # for docs/models.md
    additions: dict[str, Callable[[Any], Any]] = field(default_factory=dict)  # what else may flow beside the blocks

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """A ModelPatcher on the CPU, its weights random and of sizes that keep all features near 1."""
        import comfy.model_management
        import comfy.model_patcher
        import comfy.supported_models

        config = getattr(comfy.supported_models, self.config)(dict(self.unet))
        config.unet_config.update(self.unet)  # over what the class fixes for real sizes
        config.set_inference_dtype(torch.float32 if self.is_detected else dtype, None)
        beside = self.beside(Draw(4)) if self.beside is not None else {}
        with self.shrunk():
            model = config.get_model(dict(beside), "", device="cpu")
        fill(model.diffusion_model)
        if self.prepare is not None:
            self.prepare(model.diffusion_model)
        if self.is_detected:
            weights = {**model.diffusion_model.state_dict(), **beside}
            metadata = {"metadata": self.metadata} if self.metadata else {}
            with self.shrunk():
                patcher = _loaded(weights, model_options={"dtype": dtype}, **metadata)
            if patcher is not None and type(patcher.model) is type(model):
                return patcher
            assert is_older(), f"{self.name} was not detected"  # older loaders take some models to have one size
            model = model.to(dtype)
            model.manual_cast_dtype = None
        home = comfy.model_management.get_torch_device()
        return comfy.model_patcher.ModelPatcher(model, load_device=home, offload_device=home)

    @property
    def is_here(self) -> bool:
        """Whether this ComfyUI has it."""
        import comfy.supported_models

        return hasattr(comfy.supported_models, self.config)

    def reuses(self, strategy: str, cfg: float) -> bool:
        """Whether a strategy, by the name of its class, finds something to reuse in it at this strength of guidance."""
        has_two_axes = len(self.latent) in (4, 5) and not isinstance(self.latent[0], tuple)  # a picture's frequencies
        return {
            "FirstBlockCache": bool(self.chains),
            "TaylorSeerCache": True,  # the model's output, whatever is in the model
            "PyramidAttentionBroadcast": bool(self.attention),
            "FasterCache": "spatial" in self.attention or (has_two_axes and cfg > 1),  # else the negative prompt's
        }[strategy]

    def empty_latent(self) -> Any:
        """Zeros of the latent's shape, or of each of its shapes."""
        return _of_shape(self.latent, torch.zeros)

    def content(self) -> Any:
        """Something to refine: a latent of random numbers."""
        return _of_shape(self.latent, Draw(5))

    def noise(self, seed: int = 1) -> Any:
        """Noise of the latent's shape, or of each of its shapes."""
        return _of_shape(self.latent, Draw(seed))

    def prompts(self) -> tuple[list, list]:
        """Positive and negative: other numbers of the same shapes."""
        return self.prompt(Draw(2)), self.prompt(Draw(3))

    def start(self, denoise: float) -> Any:
        """What sampling begins with: nothing, or something to refine."""
        return self.empty_latent() if denoise == 1.0 else self.content()

    def sample(self, model: Any, start: Any, steps: int = 8, cfg: float = 3.0, denoise: float = 1.0) -> Any:
        """As the KSampler node samples it: Euler's steps on the simple scheduler."""
        import comfy.sample

        positive, negative = self.prompts()
        return comfy.sample.sample(
            model, self.noise(), steps, cfg, "euler", "simple", positive, negative, start, denoise=denoise, seed=0
        )


def is_older() -> bool:
    """Whether this ComfyUI is older than the newest that the zoo was made for."""
    from comfyui_version import __version__

    return tuple(map(int, __version__.split(".")[:2])) < NEWEST


def _loaded(weights: dict[str, Tensor], **settings: Any) -> Any:
    """What ComfyUI's loader makes of the weights; None if it can't."""
    import comfy.sd

    try:
        return comfy.sd.load_diffusion_model_state_dict(dict(weights), **settings)
    except (ValueError, RuntimeError, TypeError):
        if not is_older():
            raise
        return None


def _of_shape(shape: tuple, make: Callable[..., Tensor]) -> Any:
    if not isinstance(shape[0], tuple):
        return make(*shape)
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([make(*part) for part in shape])
