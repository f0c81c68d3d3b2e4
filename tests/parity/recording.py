"""What a sampling run did, seen from outside: outputs, final latent, and which modules really ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from models import Clock, Denoiser, denoise, diffusers, made
from torch import Tensor, nn

from cache_core.adapters.diffusers import enable_cache

NewConfig = Callable[[Denoiser, Clock], Any]


@dataclass
class Recording:
    """One run. A call is (step, branch)."""

    outputs: list[Tensor] = field(default_factory=list)
    calls: list[tuple[int, str]] = field(default_factory=list)
    ran: list[list[str]] = field(default_factory=list)  # for each call the modules that ran, in order
    latent: Tensor | None = None  # the final latents of all runs, flat

    def reused(self) -> list[tuple[int, str]]:
        """The calls in which less ran than in the fullest one."""
        most = max(map(len, self.ran), default=0)
        return [call for call, names in zip(self.calls, self.ran) if len(names) < most]

    def assert_equal(self, other: Recording) -> None:
        """Bit for bit, call by call."""
        assert self.calls == other.calls
        for call, mine, theirs in zip(self.calls, self.ran, other.ran):
            assert mine == theirs, f"{call}: other modules ran: {sorted(set(mine) ^ set(theirs))}"
        for call, mine, theirs in zip(self.calls, self.outputs, other.outputs):
            assert torch.equal(mine, theirs), f"{call}: off by {(mine - theirs).abs().max()}"
        assert (self.latent is None) == (other.latent is None)
        assert self.latent is None or torch.equal(self.latent, other.latent)


@contextmanager
def executions(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose own forward runs, as it runs: read below every hook, at their classes."""
    names = {id(module): name for name, module in model.named_modules()}
    ran: list[str] = []
    classes = {next(cls for cls in type(module).__mro__ if "forward" in vars(cls)) for module in model.modules()}
    own = {cls: cls.forward for cls in classes if cls is not nn.Module}

    def watched(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)  # diffusers reads the signature
        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if names.get(id(self)) == "":
                ran.append(f"the model on a batch of {kwargs['hidden_states'].shape[0]}")
            elif id(self) in names:
                ran.append(names[id(self)])
            return forward(self, *args, **kwargs)

        return run

    for cls, forward in own.items():
        cls.forward = watched(forward)
    try:
        yield ran
    finally:
        for cls, forward in own.items():
            cls.forward = forward


def recorded(
    denoiser: Denoiser,
    new_config: NewConfig,
    strict: bool,
    dtype: torch.dtype = torch.float32,
    runs: Callable[..., list[Tensor]] = lambda run, model: [run()],
) -> tuple[Recording, Exception | None]:
    """A run with caching: by our strict_parity, or by diffusers' own `enable_cache`. And the error it ended with.

    `runs(run, model)` calls `run(**arguments of denoise)` as often as it likes.
    """
    model, clock, recording = made(denoiser, dtype), Clock(), Recording()
    forget_parameter_names()
    with executions(model) as ran:

        def seen(step: int, branch: str, output: Tensor) -> None:
            recording.outputs.append(output.clone())
            recording.calls.append((step, branch))
            recording.ran.append(list(ran))
            ran.clear()

        try:
            config = new_config(denoiser, clock)
            enable_cache(model, config, strict_parity=True) if strict else diffusers_enable(model, config)
            latents = runs(lambda **options: denoise(denoiser, model, clock, seen=seen, **options), model)
        except Exception as error:
            return recording, error
    recording.latent = torch.cat([latent.flatten() for latent in latents])
    return recording, None


def recorded_both(
    denoiser: Denoiser, new_config: NewConfig, **options: Any
) -> tuple[tuple[Recording, Exception | None], tuple[Recording, Exception | None]]:
    """The same run with diffusers' own caching, and with our strict_parity."""
    theirs = recorded(denoiser, new_config, strict=False, **options)
    return theirs, recorded(denoiser, new_config, strict=True, **options)


def diffusers_enable(model: nn.Module, config: Any) -> None:
    """Caching as diffusers does it, also on a model without CacheMixin."""
    if hasattr(model, "enable_cache"):
        model.enable_cache(config)
        return
    hooks = diffusers.hooks
    functions = {
        hooks.FirstBlockCacheConfig: hooks.apply_first_block_cache,
        hooks.TaylorSeerCacheConfig: hooks.apply_taylorseer_cache,
        hooks.PyramidAttentionBroadcastConfig: hooks.apply_pyramid_attention_broadcast,
        hooks.FasterCacheConfig: hooks.apply_faster_cache,
    }
    functions[type(config)](model, config)


def forget_parameter_names() -> None:
    """diffusers keeps a class's parameter names once it looked one up in vain, and then raises another error."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()
    for metadata in TransformerBlockRegistry._registry.values():
        metadata._cached_parameter_indices = None
