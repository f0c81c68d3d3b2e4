"""One rank that samples a tiny Flux with diffusers' own context parallelism. Run by test_ranks.py.

python ranks_worker.py RANK WORLD STORE RESULT
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import FirstBlockCacheConfig
from models import FLUX, Clock, denoise, made

from cache_core.adapters.diffusers import apply
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

STRATEGIES = {
    "first block": FirstBlockCache(residual_diff_threshold=0.6),
    "output": TaylorSeerCache(cache_interval=2),
}


def sample(model, strategy, **options):
    with apply(model, strategy, **options) as handle:
        latent = denoise(FLUX, model, Clock(), steps=10)
        handle.report.close()
        calls = handle.report.calls
        told = {"actions": [call.action for call in calls], "measures": [call.measure for call in calls]}
        return told | {"latent": latent.flatten().tolist(), "blocks": handle.report.blocks}


def main(rank, world, store, result):
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.accelerator.device_count = lambda: 1  # diffusers takes for granted that there is an accelerator
    model = made(FLUX)
    found = {f"{name}, one process": sample(model, strategy) for name, strategy in STRATEGIES.items()}
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    found |= {name: sample(model, strategy) for name, strategy in STRATEGIES.items()}
    found["given"] = sample(model, STRATEGIES["first block"], group=dist.group.WORLD)
    try:
        apply(model, FirstBlockCacheConfig(threshold=0.1), strict_parity=True)
    except ValueError as error:
        found["strict"] = str(error)
    late = made(FLUX)
    apply(late, STRATEGIES["first block"])
    late.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    try:
        denoise(FLUX, late, Clock(), steps=2)
    except RuntimeError as error:
        found["late"] = str(error)
    Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # without finalising: torch's own threads now and then end a rank with std::terminate there


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
