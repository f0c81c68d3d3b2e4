"""One rank that samples tiny models with diffusers' context parallelism, each strategy in turn. Run by test_splits.py.

python splits_worker.py RANK WORLD STORE RESULT
"""

import json
import logging
import os
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from models import FLUX, FLUX2, HUNYUAN_VIDEO, LTX, QWEN_IMAGE, WAN, Clock, denoise, made

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
    "attention": PyramidAttentionBroadcast(),
    "guidance": FasterCache(),
}
SPLIT = {
    name: ContextParallelInput(split_dim=1, expected_dims=3) for name in ("hidden_states", "encoder_hidden_states")
}
PLAN = {  # a user's own, for a model without one: split at the first block of the first list, gathered at the last
    "rope": {place: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True) for place in (0, 1)},
    "transformer_blocks.0": SPLIT,
    "single_transformer_blocks.2": [ContextParallelOutput(gather_dim=1, expected_dims=3)] * 2,
}


def changed(denoiser, latent=None, **arguments):
    """A model that is called with other arguments, maybe of another shape."""
    inputs = lambda *given: denoiser.inputs(*given) | {name: make(*given) for name, make in arguments.items()}  # noqa: E731
    return replace(denoiser, inputs=inputs, latent=latent or denoiser.latent)


def ids_of(name):
    return lambda *given: FLUX2.inputs(*given)[name][None]  # as Flux.2's pipeline passes them


UNEVEN_WAN = changed(WAN, latent=(1, 4, 3, 6, 6))  # 27 tokens
UNEVEN_QWEN = changed(QWEN_IMAGE, latent=(1, 35, 4), img_shapes=lambda latent, *_: [[(1, 5, 7)]] * len(latent))
UNMASKED_QWEN = changed(UNEVEN_QWEN, encoder_hidden_states_mask=lambda *_: None)
CASES = {
    2: {
        "Wan": (WAN, {"ulysses_degree": 2}),
        "Wan, ring": (WAN, {"ring_degree": 2}),
        "Wan, uneven": (UNEVEN_WAN, {"ulysses_degree": 2, "ulysses_anything": True}),
        "Qwen-Image": (QWEN_IMAGE, {"ulysses_degree": 2}),
        "Qwen-Image, uneven": (UNEVEN_QWEN, {"ulysses_degree": 2, "ulysses_anything": True}),
        "HunyuanVideo": (HUNYUAN_VIDEO, {"ulysses_degree": 2}),
        "LTX": (changed(LTX, encoder_attention_mask=lambda *_: None), {"ulysses_degree": 2}),
        "Flux, ring": (FLUX, {"ring_degree": 2}),
        "Flux.2": (changed(FLUX2, img_ids=ids_of("img_ids"), txt_ids=ids_of("txt_ids")), {"ulysses_degree": 2}),
    },
    4: {
        "Wan, both": (WAN, {"ulysses_degree": 2, "ring_degree": 2}),
        "Wan, uneven ring": (UNEVEN_WAN, {"ring_degree": 4, "ring_anything": True}),
        "Qwen-Image, uneven ring": (UNMASKED_QWEN, {"ring_degree": 4, "ring_anything": True}),
    },
}
ALL, SOME = list(STRATEGIES), ["first block", "stack", "attention", "guidance"]
PLANS = {"HunyuanVideo": PLAN}


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
        return told | {"share": report.computed_share, "latent": latent.flatten().tolist()}


def main(rank, world, store, result):
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.Logger.warning_once = lambda *_: None  # comes with transformers; diffusers calls it all the same
    attention_dispatch._native_attention_forward_op = with_sums(attention_dispatch._native_attention_forward_op)
    dist.all_gather = all_gather_any
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.accelerator.device_count = lambda: 1  # diffusers takes for granted that there is an accelerator
    found, turns = {}, count()
    for name, (denoiser, degrees) in CASES[world].items():
        parallel = made(denoiser)
        parallel.enable_parallelism(config=ContextParallelConfig(**degrees), cp_plan=PLANS.get(name))
        for job, strategy in ((job, STRATEGIES[job]) for job in (ALL if name in ("Wan", "Qwen-Image") else SOME)):
            if next(turns) % world == rank:  # each rank does some of the runs by one process
                found[f"{name}: {job}, one process"] = sample(denoiser, made(denoiser), strategy)
            found[f"{name}: {job}"] = sample(denoiser, parallel, strategy)
    Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # without finalising: torch's own threads now and then end a rank with std::terminate there


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
