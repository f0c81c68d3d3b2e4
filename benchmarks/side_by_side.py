"""One sampling run of ComfyUI in which every model call is made twice: with the cache, and without."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from random_models import Shape, load

if TYPE_CHECKING:
    from cache_core.report.report import Report
    from cache_core.strategy.strategy import Strategy


class Amount(NamedTuple):
    """What one call took: seconds, or whatever the meter counts, and seconds on the wall clock."""

    value: float
    wall: float = 0.0


Meter = Callable[[Callable[[], Any]], tuple[Any, Amount]]  # runs the call; what it returned, and what it took


def cpu_time(call: Callable[[], Any]) -> tuple[Any, Amount]:
    """Seconds on the cores, of all threads together."""
    wall_began, began = time.perf_counter(), time.process_time()
    output = call()
    return output, Amount(time.process_time() - began, time.perf_counter() - wall_began)


def device_events(call: Callable[[], Any]) -> tuple[Any, Amount]:
    """Seconds between two CUDA events on an idle device: the launching of the kernels counts as well."""
    import torch

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall_began = time.perf_counter()
    began.record()
    output = call()
    ended.record()
    torch.cuda.synchronize()
    return output, Amount(began.elapsed_time(ended) / 1000, time.perf_counter() - wall_began)


def device_peak(call: Callable[[], Any]) -> tuple[Any, Amount]:
    """The most bytes allocated on the device at any time of the call."""
    import torch

    if not torch.cuda.is_available():
        return call(), Amount(float("nan"))
    torch.cuda.reset_peak_memory_stats()
    return call(), Amount(torch.cuda.max_memory_allocated())


def host_reads(call: Callable[[], Any]) -> tuple[Any, Amount]:
    """How often the host reads a tensor's value, which on CUDA waits for the device."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    reads = []

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            name = function.overloadpacket
            copied_from = {torch.ops.aten._to_copy: 0, torch.ops.aten.copy_: 1}.get(name)
            reached_host = copied_from is not None and args[copied_from].is_cuda and not output.is_cuda
            if reached_host or name in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                reads.append(str(name))
            return output

    class Called(TorchFunctionMode):  # on the CPU `tolist` copies nothing, so that the other mode would not see it
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.tolist and not args[0].is_cuda:
                reads.append("tolist")
            return function(*args, **(kwargs or {}))

    with Called(), Dispatched():
        output = call()
    return output, Amount(len(reads))


class SideBySide:
    """An APPLY_MODEL wrapper around the cache's own: makes every model call twice, with the cache and without."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.plain: list[Amount] = []
        self.cached: list[Amount] = []

    def __call__(
        self, executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: dict = {}, **conds: Any,
    ) -> Any:  # fmt: skip
        from cache_core.adapters.comfyui.wrappers import KEY

        without = {name: value for name, value in transformer_options.items() if name != KEY}
        both = [(self.plain, without), (self.cached, transformer_options)]
        outputs = {}
        for taken, options in reversed(both) if len(self.plain) % 2 else both:
            outputs[id(taken)], amount = self.meter(
                lambda options=options: executor(x, t, c_concat, c_crossattn, control, options, **conds)
            )
            taken.append(amount)
        return outputs[id(self.cached)]


@dataclass
class Ended:
    """Collects the report of a run that ended by itself."""

    report: Report
    reports: list[Report]

    def called(self) -> None: ...

    def ended(self, latent: Any) -> None:
        if self.report.state == "finished":
            self.reports.append(self.report)


@dataclass
class Run:
    """One sampling run, each call made both ways."""

    plain: list[Amount]
    cached: list[Amount]
    outside: Amount  # what the run spent outside the model
    report: Report

    def ratios(self, clock: str = "value") -> list[float]:
        """Cached over plain, call by call."""
        return [getattr(cached, clock) / getattr(plain, clock) for plain, cached in zip(self.plain, self.cached)]


class Sampling:
    """A model with noise and a prompt, ready to be sampled with any strategy."""

    def __init__(self, shape: Shape, device: str) -> None:
        import torch

        self.model, self.shape = load(shape, device)
        self.device, generator = device, torch.Generator().manual_seed(1)
        self.noise = torch.randn(shape.latent, generator=generator)
        extra = {"guidance": 3.5}
        if shape.pooled:
            extra["pooled_output"] = torch.randn(1, shape.pooled, generator=generator)
        self.prompt = [[torch.randn(1, *shape.text, generator=generator), extra]]

    @property
    def clock(self) -> Meter:
        return cpu_time if self.device == "cpu" else device_events

    def run(self, strategy: Strategy, steps: int, meter: Meter) -> Run:
        """Sample once."""
        import comfy.sample
        import torch
        from comfy.patcher_extension import WrappersMP

        from cache_core.adapters.comfyui.wrappers import with_cache

        pairs, reports = SideBySide(meter), []
        model = self.model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark", pairs)  # first in, so outside the cache's
        model = with_cache(model, strategy, watch=lambda report: Ended(report, reports))
        sample = lambda: comfy.sample.sample(  # noqa: E731
            model, self.noise, steps, 1.0, "euler", "simple", self.prompt, self.prompt, torch.zeros_like(self.noise),
            disable_pbar=True, seed=1,
        )  # fmt: skip
        latent, whole = meter(sample)
        if not latent.isfinite().all():
            raise RuntimeError("The random model's latent is not finite. Its times would not be a trained model's.")
        both = [*pairs.plain, *pairs.cached]
        outside = Amount(whole.value - sum(a.value for a in both), whole.wall - sum(a.wall for a in both))
        return Run(pairs.plain, pairs.cached, outside, reports[0])

    @contextmanager
    def empty_blocks(self) -> Iterator[None]:
        """Inside the `with`, blocks hand on their streams, a little larger."""
        from torch import nn

        from cache_core.model.hooks import HookRegistry

        def barely(forward: Any, *args: Any, **kwargs: Any) -> Any:
            image = args[0] if args else kwargs["img"]
            return (image * 1.001, kwargs["txt"] * 1.001) if "txt" in kwargs else image * 1.001

        hooks = HookRegistry()
        for blocks in self.model.model.diffusion_model.children():
            for block in blocks if isinstance(blocks, nn.ModuleList) else ():
                hooks.add(block, barely)
        with hooks:
            yield
