"""What ranks of torch.distributed save together, and what deciding alike costs them.

    python benchmarks/ranks.py [--ranks 1 2 4] [--steps 20] [--layers 8] [--json FILE]

Needs diffusers 0.42.1. A Wan transformer with random weights is sampled by diffusers' own context parallelism
(Ulysses), both prompts in turns: with gloo on the CPU, and with NCCL where there is a GPU for each rank. Printed for
each strategy and number of ranks: whether all ranks decided as one process did; the share of blocks or attentions that
each computed; how far the latent is from one process's; what the ranks exchanged in order to decide (the model's own
exchange of tokens is not counted): bytes and waits for each model call, and in the whole run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cache_core.adapters.diffusers import apply, cache_context
from cache_core.run.ranks import Ranks
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

STRATEGIES = {
    "First Block Cache": FirstBlockCache(residual_diff_threshold=0.3),
    "TaylorSeer, output": TaylorSeerCache(),
    "TaylorSeer, model": TaylorSeerCache(cache_level="model"),
    "Pyramid Attention": PyramidAttentionBroadcast(),
    "FasterCache": FasterCache(),
}
HEADS, WIDTH, TEXT = 4, 16, 16
LATENT = (1, 16, 3, 16, 16)  # 192 tokens
GUIDANCE = 4.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    rows: list[dict[str, Any]] = []
    one: dict[str, dict[str, Any]] = {}
    for world in sorted({1, *chosen.ranks}):
        with tempfile.TemporaryDirectory() as folder:
            worker = partial(sampled_by, world=world, folder=folder, steps=chosen.steps, layers=chosen.layers)
            torch.multiprocessing.spawn(worker, nprocs=world)
            ranks = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world)]
        one = one or ranks[0]
        rows += [row_of(name, [rank[name] for rank in ranks], one[name]) for name in STRATEGIES]
    for row in (list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)):
        print("|", " | ".join(map(str, row)), "|")
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1))


def row_of(name: str, ranks: list[dict[str, Any]], one: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    latent, expected = torch.tensor(ranks[0]["latent"]), torch.tensor(one["latent"])
    calls = len(one["actions"])
    return {
        "strategy": name,
        "ranks": len(ranks),
        "decided as one process": "yes" if all(rank["actions"] == one["actions"] for rank in ranks) else "no",
        "computed, each rank": ", ".join(f"{rank['share']:.3f}" for rank in ranks),
        "latent off by": f"{float((latent - expected).norm() / expected.norm()):.1e}",
        "exchanges a run": max(rank["exchanges"] for rank in ranks),
        "waits a call": round(max(rank["exchanges"] for rank in ranks) / calls, 2),
        "bytes a call": round(max(rank["bytes"] for rank in ranks) / calls, 1),
        "seconds": round(max(rank["seconds"] for rank in ranks), 2),
    }


def sampled_by(rank: int, world: int, folder: str, steps: int, layers: int) -> None:
    """One rank's runs, one for each strategy, written to a file."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.Logger.warning_once = lambda *_: None  # comes with transformers; diffusers calls it all the same
    on_gpus = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    model = made(layers).to(device)
    if world > 1:
        dist.init_process_group(
            "nccl" if on_gpus else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
        if not on_gpus:
            torch.accelerator.device_count = lambda: 1  # diffusers takes for granted that there is an accelerator
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=world))
    counted: list[int] = []
    exchange = Ranks._reduced

    def counting(self: Ranks, numbers: Tensor, operation: Any) -> Tensor:
        counted.append(numbers.numel() * numbers.element_size())
        return exchange(self, numbers, operation)

    Ranks._reduced = counting
    found = {}
    for name, strategy in STRATEGIES.items():
        counted.clear()
        found[name] = sampled(model, strategy, steps, device) | {"exchanges": len(counted), "bytes": sum(counted)}
    Path(folder, str(rank)).write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
        os._exit(0)  # without finalising: torch's own threads now and then end a rank with std::terminate there


def made(layers: int) -> nn.Module:
    """A tiny Wan with weights of seed 0."""
    torch.manual_seed(0)
    shape = dict(num_attention_heads=HEADS, attention_head_dim=WIDTH, ffn_dim=128, num_layers=layers)
    return diffusers.WanTransformer3DModel(**shape, text_dim=32, freq_dim=32, rope_max_seq_len=32).eval()


def sampled(model: nn.Module, strategy: Any, steps: int, device: torch.device) -> dict[str, Any]:
    """One run: decisions, share, latent."""
    random = torch.Generator().manual_seed(1)
    latent, text = torch.randn(LATENT, generator=random).to(device), torch.randn(2, TEXT, 32, generator=random)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps, device=device)
    with apply(model, strategy, scheduler=scheduler) as handle:
        for timestep in scheduler.timesteps:
            predictions = []
            for name, prompt in zip(("cond", "uncond"), text.to(device).split(1)):
                with cache_context(model, name):
                    predictions.append(model(latent, timestep.expand(1), prompt, return_dict=False)[0])
            given, without = predictions
            latent = scheduler.step(without + GUIDANCE * (given - without), timestep, latent, return_dict=False)[0]
        report = handle.report
        actions = [call.action for call in report.calls]
        known = {"actions": actions, "share": report.computed_share, "seconds": report.seconds}
        return known | {"latent": latent.flatten().tolist()}


if __name__ == "__main__":
    main()
