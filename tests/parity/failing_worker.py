"""One of two ranks of diffusers' context parallelism, in runs that are refused or fail. Run by test_failing.py.

python failing_worker.py RANK WORLD STORE RESULT
"""

import gc
import json
import logging
import os
import sys
import time
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import FirstBlockCacheConfig
from models import WAN, Clock, denoise, made

from cache_core.adapters.diffusers import apply
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

LONGEST_WAIT = timedelta(seconds=15)  # of a rank for another
STRATEGIES = {
    "first block": FirstBlockCache(residual_diff_threshold=0.9),
    "stack": TaylorSeerCache(cache_interval=2, cache_level="model"),
}
UNLIKE = {  # what the two ranks have
    "thresholds": (FirstBlockCache(residual_diff_threshold=0.9), FirstBlockCache(residual_diff_threshold=0.1)),
    "strategies": (FirstBlockCache(residual_diff_threshold=0.9), PyramidAttentionBroadcast()),
}
RUNS = [
    ("stack", False, "raises"),
    ("stack", False, "memory"),
    ("stack", True, "memory"),
    ("first block", True, "memory"),
]
ERRORS = {
    "raises": lambda: ValueError("this card fell over"),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
}


def parallel():
    """The model on both ranks."""
    model = made(WAN)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    return model


def fail_in(model, error, is_reused):
    """Raise it in the middle of the run, where the last block was left out, or where it was not."""
    calls, ran = count(), []

    def look(*_):
        if next(calls) >= 8 and is_reused == (not ran):
            raise error
        ran.clear()

    model.blocks[-1].ffn.register_forward_pre_hook(lambda *_: ran.append(True))
    model.proj_out.register_forward_pre_hook(look)


def sample(model, strategy, **options):
    """A run: what its calls did, and the error that ended it."""
    began, told = time.perf_counter(), ""
    with apply(model, strategy, **options) as handle:
        try:
            denoise(WAN, model, Clock(), steps=8)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        actions = [call.action for call in handle.report.calls]
        return {"actions": actions, "error": told, "seconds": time.perf_counter() - began}


def refused(model):
    """What is said where the ranks could not decide alike."""
    try:
        apply(model, FirstBlockCacheConfig(threshold=0.1), strict_parity=True)
    except ValueError as error:
        yield "strict", str(error)
    late = made(WAN)
    apply(late, STRATEGIES["stack"])
    late.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    try:
        denoise(WAN, late, Clock(), steps=2)
    except RuntimeError as error:
        yield "late", str(error)


def main(rank, world, store, result):
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.Logger.warning_once = lambda *_: None  # comes with transformers; diffusers calls it all the same
    join = partial(dist.init_process_group, "gloo", rank=rank, world_size=world, timeout=LONGEST_WAIT)
    join(init_method=f"file://{store}")
    torch.accelerator.device_count = lambda: 1  # diffusers takes for granted that there is an accelerator
    model = parallel()
    found = dict(refused(model))
    for name, strategies in UNLIKE.items():
        found[name] = sample(model, strategies[rank])
    for job, strategy in STRATEGIES.items():
        found[f"{job}, found"] = sample(model, strategy)
        found[f"{job}, told"] = sample(model, strategy, group=dist.group.WORLD)
    for job, is_reused, error in RUNS:
        model = None
        gc.collect()
        dist.destroy_process_group()  # where a rank has failed it leaves the other, as a process that ends does
        run = f"{job}, {'reused' if is_reused else 'computed'}: {error}"
        join(init_method=f"file://{store} {run}")
        model = parallel()
        if rank == 1:
            fail_in(model, ERRORS[error](), is_reused)
        found[run] = sample(model, STRATEGIES[job])
    Path(result).write_text(json.dumps(found))
    os._exit(0)  # without finalising: one rank has left the other


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
