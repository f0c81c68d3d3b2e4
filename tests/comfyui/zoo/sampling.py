"""A model of the zoo and its sampling runs: what came out, how much was computed, what the cache held."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Reports
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cache_core.run.run import CacheRun
from cache_core.strategy.strategy import Strategy

from .architecture import Architecture, is_older

STEPS = 8


@dataclass
class Sampled:
    """One sampling run and what was seen of it."""

    latent: Any
    report: Any  # None without a strategy
    blocks: Counter  # runs of each block, by name
    flops: int
    start: Any  # the latent that sampling began with
    held: list[weakref.ref]  # tensors that the cache held when it ended

    @property
    def measures(self) -> list[float]:
        """What was measured of each call to decide on it."""
        return [call.measure for call in self.report.calls if call.measure is not None]

    @property
    def is_finite(self) -> bool:
        """Whether all that came out are numbers."""
        return all(torch.isfinite(part).all() for part in parts(self.latent))

    def still_held(self) -> list[torch.Tensor]:
        """The tensors of the cache that are still in memory."""
        gc.collect()
        return [tensor for reference in self.held if (tensor := reference()) is not None]

    def runs_in(self, chain: str) -> int:
        """How often blocks of this list ran."""
        return sum(count for name, count in self.blocks.items() if name.startswith(f"{chain}."))


class Work(TorchDispatchMode):
    """Counts floating-point operations, by the formulas of PyTorch's FlopCounterMode, which is several times slower."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def specimen_of(architecture: Architecture, dtype: torch.dtype = torch.float32) -> Iterator[Specimen]:
    """For a fixture: a specimen for as long as the fixture lives; a skip where this ComfyUI can't build one."""
    if not architecture.is_here:
        pytest.skip("this ComfyUI does not have it")
    gc.freeze()  # what is loaded by now is never looked at again: that makes each collection quick
    with pytest.MonkeyPatch.context() as patch:
        try:
            found = Specimen(architecture, dtype, patch)
        except TypeError as error:
            if not is_older():
                raise
            pytest.skip(f"this ComfyUI has it with other settings ({error})")
        yield found
    gc.collect()


class Specimen:
    """A model of one architecture, and its sampling runs, each done once."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        self.architecture = architecture
        self.model = architecture.build(dtype)
        self.network = self.model.model.diffusion_model
        self.blocks = count_runs(self.network, architecture.chains, monkeypatch)
        self.sampled = cache(self._sampled)
        self.sampled(None)  # ComfyUI leaves marks of its own when it loads a model
        self.before = self.traces()

    def traces(self) -> list[set[str]]:
        """What each module's instance carries."""
        return [set(vars(module)) for module in self.network.modules()]

    def refined(self, strategy: Strategy | None, cfg: float = 3.0) -> Sampled:
        """Along a short way in noise, as when a picture is refined: there even random models change little."""
        return self.sampled(strategy, cfg, 0.1)

    def shares_left_out(self, strategies: list[Strategy]) -> dict[str, float]:
        """The share of floating-point work that each strategy leaves out when a picture is refined."""
        plain = self.refined(None).flops
        return {type(strategy).__name__: 1 - self.refined(strategy).flops / plain for strategy in strategies}

    def with_addition(self, add: Callable[[Any], Any], strategy: Strategy) -> SimpleNamespace:
        """The latents of a `plain` run, of one with something `added`, and of such a one that is `cached`, too."""
        from cache_core.adapters.comfyui import with_cache

        sample, start = self.architecture.sample, self.architecture.empty_latent
        plain, added = self.sampled(None).latent, sample(add(self.model), start())
        cached = sample(with_cache(add(self.model), strategy), start())
        if is_older() and equal(plain, added):
            pytest.skip("this ComfyUI does not ask for such patches")
        return SimpleNamespace(plain=plain, added=added, cached=cached)

    def _sampled(
        self, strategy: Strategy | None, cfg: float = 3.0, denoise: float = 1.0, steps: int = STEPS
    ) -> Sampled:
        from cache_core.adapters.comfyui import with_cache

        reports, held, own, model = Reports(), [], CacheRun.free, self.model
        if strategy is not None:
            model = with_cache(self.model, strategy, watch=reports.watch)

        def free(run: CacheRun) -> None:
            held.extend(map(weakref.ref, tensors_in([memory.state for memory in run.state.memories.values()])))
            own(run)

        start = self.architecture.start(denoise)
        self.blocks.clear()
        with pytest.MonkeyPatch.context() as patch, Work() as work:
            patch.setattr(CacheRun, "free", free)
            try:
                latent = self.architecture.sample(model, start, steps, cfg, denoise)
            except (RuntimeError, ValueError) as error:
                if strategy is not None or not is_older():
                    raise
                pytest.skip(f"this ComfyUI can't sample it so without a cache ({error})")
        report = reports.all[0] if reports.all else None
        return Sampled(latent, report, Counter(self.blocks), work.flops, start, held)


def count_runs(network: nn.Module, chains: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts from now on how often each block in these lists runs, by name and in the blocks' own classes."""
    from cache_core.adapters.comfyui.exceptions import METHODS

    counts: Counter = Counter()
    lists = {name: network.get_submodule(name) for name in chains}
    names = {id(block): f"{name}.{key}" for name, blocks in lists.items() for key, block in blocks.named_children()}
    for block_class in {type(block) for blocks in lists.values() for block in blocks.children()}:
        method = METHODS.get(block_class.__name__, "forward")
        own = getattr(block_class, method)

        def run(block, *args, _own=own, **kwargs):
            if id(block) in names:
                counts[names[id(block)]] += 1
            return _own(block, *args, **kwargs)

        monkeypatch.setattr(block_class, method, run)
    return counts


def lists_in(report: Any) -> tuple[str, ...]:
    """The lists of blocks that are cached, as a report tells them: "2 double_blocks + 4 single_blocks"."""
    return tuple(name.split(" ", 1)[1] for name in report.blocks.split(" + ") if report.blocks[:1].isdigit())


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors that a state holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = list(value) if isinstance(value, (list, tuple)) else list(getattr(value, "__dict__", {}).values())
    return [tensor for item in inside for tensor in tensors_in(item)]


def parts(latent: Any) -> list[torch.Tensor]:
    """A latent's tensors: of one with sound, two."""
    return list(latent.unbind()) if getattr(latent, "is_nested", False) else [latent]


def equal(some: Any, other: Any) -> bool:
    """Whether two latents are the same to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(parts(some), parts(other), strict=True))


def distance(some: Any, other: Any) -> float:
    """How far apart two latents are."""
    return sum((a - b).norm() for a, b in zip(parts(some), parts(other), strict=True))
