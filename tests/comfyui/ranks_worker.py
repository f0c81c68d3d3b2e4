"""One rank that samples the demo in its own ComfyUI, together with others. Run by test_ranks.py.

python ranks_worker.py RANK WORLD STORE RESULT

Tokens are shared as packs for several cards do it: split before the first block, gathered after the last, and attention
asks all ranks for their keys and values.
"""
# ruff: noqa: E402

import json
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

COMFYUI = os.environ.get("COMFYUI_PATH") or str(Path.home() / "comfy" / "ComfyUI")
sys.path.insert(0, COMFYUI)  # before this repository, whose `nodes` would hide ComfyUI's

import comfy.cli_args

comfy.cli_args.args.cpu = True  # before the imports below

from cache_core.adapters.comfyui import demo, with_cache
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPTS = ("a big red ball at the center on a blue striped background", "a small green cube on a white background")
STRATEGIES = {
    "first block": FirstBlockCache(residual_diff_threshold=0.3),
    "output": TaylorSeerCache(cache_interval=3),
    "stack": TaylorSeerCache(cache_interval=3, cache_level="model"),
    "attention": PyramidAttentionBroadcast(),
    "guidance": FasterCache(unconditional_batch_skip_range=3),
}
TOKENS = ("img", "txt", "img_ids", "txt_ids")
LONGEST_WAIT = timedelta(seconds=10)


def whole(part, dim):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return torch.cat(parts, dim)


def sharing_tokens(model, rank, world):
    """A clone whose ranks compute a part of the tokens each."""

    def split(streams):
        parts = {name: value.tensor_split(world, 1)[rank] for name, value in streams.items() if name in TOKENS}
        return streams | parts

    def attend(function, query, key, value, heads, *rest, **options):
        key, value = (whole(each, 2 if options.get("skip_reshape") else 1) for each in (key, value))
        return function(query, key, value, heads, *rest, **options)

    model = model.clone()
    model.set_model_patch(split, "post_input")
    model.model_options["transformer_options"]["optimized_attention_override"] = attend
    network = model.model.diffusion_model
    network.final_layer.register_forward_pre_hook(lambda _, args: (whole(args[0], 1), *args[1:]))
    return model


def sample(model, clip, strategy, number=0, **options):
    """A run: what was decided, what was reused, the latent it ends with, or the error that ended it."""
    reports, began = [], time.perf_counter()

    def watch(report):
        reports.append(report)
        return SimpleNamespace(called=lambda: None, ended=lambda latent: None)

    told = {"error": ""}
    try:
        latent = demo.sample(
            with_cache(model, strategy, watch=watch, **options), clip, [PROMPTS[number]], steps=12, seed=number
        )
        told |= {"latent": latent.flatten().tolist(), "share": reports[-1].computed_share}
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"
    (report,) = reports
    told |= {"actions": [call.action for call in report.calls], "measures": [call.measure for call in report.calls]}
    return told | {"notes": report.notes, "seconds": time.perf_counter() - began}


def in_float32():
    model = demo.load_model()
    model.model.diffusion_model.to(torch.float32).dtype = torch.float32
    model.model.manual_cast_dtype = None
    return model


def fail_in(model):
    """Falls over after a while, on one card."""
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 6:
            raise ValueError("this card fell over")

    model.model.diffusion_model.final_layer.register_forward_pre_hook(fail)


def jobs(rank, world):
    group, clip = dist.group.WORLD, demo.load_clip()
    alone, shared = in_float32(), sharing_tokens(in_float32(), rank, world)
    for name, strategy in STRATEGIES.items():
        yield name, sample(shared, clip, strategy, group=group)
        if rank == 0:
            yield f"{name}, one process", sample(alone, clip, strategy)
    strict = FirstBlockCache(residual_diff_threshold=0.25)
    yield "other pictures", sample(alone, clip, strict, rank % 2, group=group)
    yield "other pictures, no group", sample(alone, clip, strict, rank % 2)
    unlike = replace(STRATEGIES["first block"], residual_diff_threshold=0.3 + rank / 10)
    yield "unlike", sample(alone, clip, unlike, group=group)
    if rank == world - 1:
        fail_in(alone)
    yield "failure", sample(alone, clip, STRATEGIES["first block"], group=group)


@torch.no_grad()
def main(rank, world, store, result):
    torch.set_num_threads(1)
    join = {"rank": rank, "world_size": world, "timeout": LONGEST_WAIT}
    dist.init_process_group("gloo", init_method=f"file://{store}", **join)
    Path(result).write_text(json.dumps(dict(jobs(rank, world))))
    os._exit(0)  # without finalising: one rank has left the others


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
