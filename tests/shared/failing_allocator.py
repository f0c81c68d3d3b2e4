"""A simulated allocator: memory runs out at the n-th tensor that a cache makes for itself."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cache_core
from cache_core.run.run import CacheRun
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy import Strategy

OURS = str(Path(cache_core.__file__).parent)
BETWEEN = str(Path(torch.__file__).parent)  # PyTorch's own Python, between who asks and the operation
TAYLOR = dict(cache_interval=2, few_steps="draft")
ALWAYS = dict(spatial_attention_timestep_skip_end=1001, few_steps="draft")
BROADCAST = PyramidAttentionBroadcast(spatial_attention_timestep_skip_start=-1, **ALWAYS)
STEPS = {  # the fewest in which each reuses something
    FirstBlockCache(residual_diff_threshold=1.0, repair="off"): 9,  # with fewer its changes count for more
    TaylorSeerCache(**TAYLOR): 4,
    TaylorSeerCache(**TAYLOR, cache_level="model"): 4,
    TaylorSeerCache(**TAYLOR, cache_level="block"): 4,
    TaylorSeerCache(**TAYLOR, cache_level="module"): 4,
    BROADCAST: 3,
    replace(BROADCAST, cache_device="cpu"): 3,
    replace(BROADCAST, cache_dtype="8 bit"): 3,
    replace(BROADCAST, cache_device="cpu", cache_dtype="8 bit"): 3,
    # not both in one step: an estimate beside attention that is computed after all may be off by more than both are
    FasterCache(spatial_attention_timestep_skip_start=400, unconditional_batch_timestep_skip_end=300, **ALWAYS): 4,
}


def name_of(strategy: Strategy) -> str:
    """For a test's id."""
    return ", ".join([strategy.title, strategy.levels[0], strategy.cache_device, strategy.cache_dtype])


class FailingAllocator(TorchDispatchMode):
    """Counts what code of `cache_core` makes tensors by while this is on, and fails at one of them.

    That is every operation of PyTorch with memory of its own for its results, however small, that a line of the cache
    asks for: clones, joined batches, forecasts, thinned latents, scalars. What the model makes does not count.
    """

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__()
        self.fails_at, self.failed_in, self.count = fails_at, "", 0
        self.made: list[weakref.ref] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_ours = not self.failed_in and _takes_memory(func)
        if is_ours:
            frame = sys._getframe(1)
            while frame.f_code.co_filename.startswith(BETWEEN):
                frame = frame.f_back
            is_ours = frame.f_code.co_filename.startswith(OURS)
        if is_ours and self.count == self.fails_at:
            self.failed_in = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        output = func(*args, **(kwargs or {}))
        if is_ours:
            self.count += 1
            self.made += map(weakref.ref, (output,) if isinstance(output, torch.Tensor) else output)
        return output


def check_every_failure(
    sample: Callable[[], tuple[torch.Tensor, Any]], plain: torch.Tensor, patch: Any, guidance: float | None = None
) -> None:
    """Memory runs out at each tensor in turn of a run: it goes on without the cache, says so once, and holds nothing.

    `sample` gives a cached run's latent and report, `plain` is the latent without a cache. The result is that latent,
    or off by at most what the whole cached run is off by. Where prompts are called apart, with this `guidance`, memory
    may run out when one of them has been given a forecast and before the other is: that one evaluation, the last in
    which anything is reused, is then half computed, and guidance enlarges what the forecast is off by.
    """
    kept, own = [], CacheRun.free

    def free(run: CacheRun) -> None:
        kept.append(run.state.memories.bytes_held + run.state.memories.bytes_away)
        own(run)

    patch.setattr(CacheRun, "free", free)
    with FailingAllocator() as counting:
        latent, report = sample()
    reused, most = report.count("reused", "forecast"), (latent - plain).norm()
    assert not _half_computed(report)
    assert reused and most > 0 and report.bytes_held + report.bytes_away and not report.notes
    kept.clear()
    made = []
    for fails_at in range(counting.count):
        with FailingAllocator(fails_at) as allocator:
            latent, report = sample()
        assert allocator.failed_in, fails_at
        assert ["memory ran out" in note for note in report.notes] == [True], (allocator.failed_in, report.notes)
        torn = _half_computed(report)
        assert not torn or (guidance and torn == {max(_reusing(report))}), (allocator.failed_in, torn)
        times = guidance if torn else 1.001
        assert report.count("reused", "forecast") <= reused and (latent - plain).norm() <= most * times
        assert report.count("reused", "forecast") or torch.equal(latent, plain), allocator.failed_in
        made += allocator.made
    assert len(kept) >= counting.count and not any(kept)
    gc.collect()
    assert [tensor() for tensor in made if tensor() is not None] == []


def _reusing(report: Any, is_reusing: bool = True) -> set[int]:
    """The evaluations in which a branch called was reused, or computed. Its last call counts, and no estimate of it."""
    called = [call for call in report.calls if not call.reason.startswith("the negative prompt is computed once")]
    last = {(call.evaluation, branch): call.action for call in called for branch in call.branches}
    return {evaluation for (evaluation, _), action in last.items() if (action != "computed") == is_reusing}


def _half_computed(report: Any) -> set[int]:
    return _reusing(report) & _reusing(report, False)


@cache
def _takes_memory(func: Any) -> bool:
    """Whether all that an operation gives are tensors, no views of an argument and not written into one."""
    results = func._schema.returns
    return bool(results) and all(str(each.type) == "Tensor" and each.alias_info is None for each in results)
