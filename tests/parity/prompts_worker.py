"""One rank of classifier-free-guidance parallelism: it has one of the two prompts. Run by test_prompts_apart.py.

python prompts_worker.py RANK WORLD STORE RESULT

With two ranks each has a prompt. With four, two share the tokens of each. The loop is that of docs/diffusers.md.
"""

import json
import logging
import os
import re
import runpy
import sys
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from models import GUIDANCE, TEXT_TOKENS, TEXT_WIDTH, WAN, made
from torch.distributed.device_mesh import init_device_mesh

from cache_core.adapters.diffusers import apply, cache_context
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

DOCS = Path(__file__).parents[2] / "docs" / "diffusers.md"
STEPS = 20
THRESHOLDS = (0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
STRATEGIES = {
    f"first block {threshold:g}": FirstBlockCache(residual_diff_threshold=threshold) for threshold in THRESHOLDS
}
OTHERS = {
    "stack": TaylorSeerCache(cache_interval=2, cache_level="model"),
    "attention": PyramidAttentionBroadcast(),
    "guidance": FasterCache(),
}
SAMPLED = [f"first block {threshold:g}" for threshold in THRESHOLDS[3::3]]  # where four ranks do too


def predictions_here(transformer, latents, timestep, embeds):
    """Both predictions by this process."""
    with cache_context(transformer, "cond"):
        given = transformer(latents, timestep, embeds[1], return_dict=False)[0]
    with cache_context(transformer, "uncond"):
        return transformer(latents, timestep, embeds[0], return_dict=False)[0], given


def predictions_apart(transformer, latents, timestep, embeds, rank, group):
    """The prediction of this rank's prompt, and the other's from the rank that has it."""
    with cache_context(transformer, ("uncond", "cond")[rank]):
        own = transformer(latents, timestep, embeds[rank], return_dict=False)[0]
    predictions = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(predictions, own.contiguous(), group=group)
    return predictions


def sample(model, strategy, predict, *where, **options):
    """A sampling run: decisions, and the latent it ends with."""
    random = torch.Generator().manual_seed(1)
    text = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=random).split(1)
    latent, scheduler = torch.randn(WAN.latent, generator=random), WAN.scheduler()
    scheduler.set_timesteps(STEPS)
    with apply(model, strategy, scheduler=scheduler, **options) as handle:
        for timestep in scheduler.timesteps:
            without, given = predict(model, latent, timestep.expand(1), text, *where)
            latent = scheduler.step(without + GUIDANCE * (given - without), timestep, latent, return_dict=False)[0]
        report = handle.report
        told = {"actions": [call.action for call in report.calls], "notes": report.notes}
        return told | {"share": report.computed_share, "latent": latent.flatten().tolist()}


def documented(transformer):
    """What docs/diffusers.md says, as it stands there: the latent that it ends with."""
    (code,) = re.findall(r"```python\n(rank = .*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    random = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=random).split(1)
    latents, scheduler = torch.randn(WAN.latent, generator=random), WAN.scheduler()
    scheduler.set_timesteps(STEPS)
    known = dict(transformer=transformer, latents=latents, scheduler=scheduler, embeds=embeds, guidance=GUIDANCE)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "documented.py")
        script.write_text(code, encoding="utf-8")
        names = runpy.run_path(str(script), init_globals=globals() | known)
    return {"lines": len(code.splitlines()), "latent": names["latents"].flatten().tolist()}


def out_of_memory(calls, *_):
    """In the eighth call."""
    if next(calls) == 8:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def in_one_process(denoiser_model):
    """The same runs by one process, and the picture without a cache."""
    uncached = sample(denoiser_model, FirstBlockCache(residual_diff_threshold=1e-9), predictions_here)
    default = sample(denoiser_model, FirstBlockCache(), predictions_here)
    return {"uncached": uncached, "documented": default} | {
        name: sample(denoiser_model, strategy, predictions_here) for name, strategy in (STRATEGIES | OTHERS).items()
    }


def main(rank, world, store, result):
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.Logger.warning_once = lambda *_: None  # comes with transformers; diffusers calls it all the same
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.accelerator.device_count = lambda: 1  # diffusers takes for granted that there is an accelerator
    mesh = init_device_mesh("cpu", (2, 1, world // 2), mesh_dim_names=("prompt", "ring", "ulysses"))
    side, pair = mesh["prompt"].get_local_rank(), mesh["prompt"].get_group()
    found = {"side": side, "one process": in_one_process(made(WAN)) if rank == 0 else None}
    model = made(WAN)
    if world > 2:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world // 2, mesh=mesh))
    jobs = (STRATEGIES | OTHERS).items()
    jobs = [job for job in jobs if world == 2 or job[0] in (*SAMPLED, *OTHERS)]
    for name, strategy in jobs:
        found[name] = sample(model, strategy, predictions_apart, side, pair, group=dist.group.WORLD)
        dist.barrier()
    if world == 2:
        found["no group"] = sample(model, STRATEGIES["first block 0.15"], predictions_apart, side, pair)
        found["documented"] = documented(model)

    if rank == world - 1:
        model.patch_embedding.register_forward_pre_hook(partial(out_of_memory, count()))
    began = time.perf_counter()
    try:
        sample(model, STRATEGIES["first block 0.2"], predictions_apart, side, pair, group=dist.group.WORLD)
    except RuntimeError as error:
        found["failure"] = {"text": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - began}
    Path(result).write_text(json.dumps(found))
    os._exit(0)  # without finalising: one rank has left the others


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
