"""One rank that samples tiny models with diffusers' parallelism, each strategy in turn. Run by test_splits.py.

python splits_worker.py RANK WORLD STORE RESULT
"""

import json
import logging
import os
import sys
from itertools import cycle
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import cpu_offload
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from diffusers.models import attention_dispatch
from models import Clock, denoise, made
from planned import EVEN, UNEVEN, UNMASKED, plan_of

from cache_core.adapters.diffusers import apply
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

STEPS = 8
STRATEGIES = {
    "first block": FirstBlockCache(residual_diff_threshold=0.9),
    "output": TaylorSeerCache(cache_interval=2),
    "stack": TaylorSeerCache(cache_interval=2, cache_level="model"),
    "block": TaylorSeerCache(cache_interval=2, cache_level="block"),
    "module": TaylorSeerCache(cache_interval=2, cache_level="module"),
    "attention": PyramidAttentionBroadcast(),
    "guidance": FasterCache(),
}
WAYS = {  # to share out the tokens, in turns, among so many ranks
    2: {
        "Ulysses": {"ulysses_degree": 2},
        "uneven ring": {"ring_degree": 2, "ring_anything": True},
        "uneven Ulysses": {"ulysses_degree": 2, "ulysses_anything": True},
        "ring": {"ring_degree": 2},
    },
    4: {
        "both": {"ulysses_degree": 2, "ring_degree": 2},
        "uneven ring": {"ring_degree": 4, "ring_anything": True},
        "Ulysses": {"ulysses_degree": 4},
        "uneven Ulysses": {"ulysses_degree": 4, "ulysses_anything": True},
        "ring": {"ring_degree": 4},
    },
}
ONLY = {"HunyuanVideo": "Ulysses"}  # its attention takes a mask, which an uneven ring does not
WEIGHTS = ("Flux", "Flux.2", "Qwen-Image")  # models whose weights diffusers shares out, too
OFFLOADED = ("first block", "stack", "attention", "guidance")


def cases(world):
    """Each model with each strategy, one after the other in another of the ways: model, way, job."""
    ways = cycle(WAYS[world])
    for name in EVEN:
        yield from ((name, ONLY.get(name) or next(ways), job) for job in STRATEGIES)
    if world == 2:
        yield from ((name, "weights", job) for name in WEIGHTS for job in STRATEGIES)
        yield from ((name, "offloaded", job) for name in ("Wan", "Flux") for job in OFFLOADED)


def parallel(name, way, rank, world):
    """The model among the ranks, and how it is called."""
    models = UNEVEN if way.startswith("uneven") else UNMASKED if way == "both" else EVEN
    denoiser = models[name]
    model = made(denoiser)
    if way == "weights":
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=world))
    else:
        degrees = WAYS[world]["Ulysses" if way == "offloaded" else way]
        model.enable_parallelism(config=ContextParallelConfig(**degrees), cp_plan=plan_of(model))
    if way == "offloaded":  # by each rank as it likes
        here = torch.device("cpu")
        model.enable_group_offload(here, here, "leaf_level") if rank == 0 else cpu_offload(model, here)
    return denoiser, model


def with_sums(native):
    """Attention on the CPU that also tells the logarithm of its sums, which ring attention needs."""

    def attention(ctx, query, key, value, *rest, return_lse=False, **options):
        rest, asked = (rest[:5], rest[5]) if len(rest) > 5 else (rest, return_lse)
        out = native(ctx, query, key, value, *rest, **options)
        if not asked:
            return out
        scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * query.shape[-1] ** -0.5
        return out, scores.logsumexp(-1)

    return attention


def all_gather_any(gathered, tensor, group=None, gather=dist.all_gather):
    """gloo's gathers tensors of one size; NCCL's of any."""
    most = max(each.numel() for each in gathered)
    padded = [tensor.new_zeros(most) for _ in gathered]
    gather(padded, torch.cat([tensor.flatten(), tensor.new_zeros(most - tensor.numel())]), group=group)
    for each, flat in zip(gathered, padded):
        each.copy_(flat[: each.numel()].view_as(each))


def sample(denoiser, model, strategy):
    """A sampling run: what was decided, what was reused, and the latent it ends with."""
    with apply(model, strategy) as handle:
        latent = denoise(denoiser, model, Clock(), steps=STEPS)
        report = handle.report
        report.close()
        told = {"actions": [call.action for call in report.calls], "blocks": report.blocks, "notes": report.notes}
        told["measures"] = [call.measure for call in report.calls]
        return told | {"share": report.computed_share, "latent": latent.flatten().tolist()}


def main(rank, world, store, result):
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.Logger.warning_once = lambda *_: None  # comes with transformers; diffusers calls it all the same
    attention_dispatch._native_attention_forward_op = with_sums(attention_dispatch._native_attention_forward_op)
    dist.all_gather = all_gather_any
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.accelerator.device_count = lambda: 1  # diffusers takes for granted that there is an accelerator
    found, models = {}, {}
    for turn, (name, way, job) in enumerate(cases(world)):
        if (name, way) not in models:
            models[name, way] = parallel(name, way, rank, world)
        denoiser, model = models[name, way]
        found[f"{name}, {way}: {job}"] = sample(denoiser, model, STRATEGIES[job])
        if turn % world == rank:  # each rank does some of the runs by one process
            found[f"{name}, {way}: {job}, one process"] = sample(denoiser, made(denoiser), STRATEGIES[job])
    Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # without finalising: torch's own threads now and then end a rank with std::terminate there


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
