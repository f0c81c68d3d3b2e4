"""One rank of a group of processes that sample one picture, each with a part of its tokens. Run by test_ranks.py.

python ranks_worker.py RANK WORLD STORE RESULT
"""

import json
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from toy import Attending, C, SingleBlock, W, sigmas_of

from cache_core import CacheRun, Schedule
from cache_core.model import rehearsal
from cache_core.run.alike import Decisions
from cache_core.run.ranks import Ranks
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

TOKENS = 10
BROADCAST = PyramidAttentionBroadcast(
    spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=1001
)


class Spread(nn.Module):
    """Blocks on tokens that may be spread over ranks: attention gathers keys and values from all."""

    def __init__(self, gathers: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.sigma, self.head = nn.Linear(C, W), nn.Linear(2, W), nn.Linear(W, C)
        self.blocks = nn.ModuleList(SingleBlock() for _ in range(4))
        for module in self.modules():
            if isinstance(module, Attending) and gathers:
                module.attend = lambda operation, query, key, value: operation(query, whole(key), whole(value))

    def forward(self, latent, sigma):
        angle = sigma[:, None, None]
        x, vec = self.embed(latent), self.sigma(torch.cat((angle.sin(), angle.cos()), -1))
        for block in self.blocks:
            x = block(x, vec)
        return self.head(x)


def whole(part):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return torch.cat(parts, 1)


def sample(strategy, latent, gathers, group, free=None, prompt=lambda step: "prompt"):
    """A sampling run of this rank's tokens: its decisions, and the latent it ends with."""
    model, sigmas = Spread(gathers), sigmas_of(16)
    run = CacheRun([strategy], Schedule(sigmas), ranks=Ranks(group), free=lambda device: free)
    decisions = Decisions(run.state.terms.ranks)
    for step, (now, following) in enumerate(pairwise(sigmas)):
        level = torch.full((1,), now)
        run.begin_evaluation()
        velocity = run.call_model(model, lambda latent=latent, level=level: model(latent, level), level, [prompt(step)])
        latent = latent + (following - now) * velocity
    run.report.close()
    decisions.tell(run.report)
    actions = [call.action for call in run.report.calls]
    return {
        "actions": actions,
        "measures": [call.measure for call in run.report.calls],
        "notes": run.report.notes,
        "share": run.report.computed_share,
    }, latent


def alone(strategy, latent):
    return sample(strategy, latent, gathers=False, group=None)


def jobs(rank, world):
    group, first_block = dist.group.WORLD, FirstBlockCache(residual_diff_threshold=0.05)
    latent = torch.randn(1, TOKENS, C, generator=torch.Generator().manual_seed(1)) * torch.arange(TOKENS)[:, None]
    mine = latent.tensor_split(world, 1)[rank]
    pairs = (("first block", first_block), ("stack", TaylorSeerCache(cache_level="model")))
    for name, strategy in (*pairs, ("wished", FirstBlockCache(target_speedup=1.6))):
        spread, part = sample(strategy, mine, True, group)
        expected, picture = alone(strategy, latent)
        yield name, {**spread, "expected": expected, "error": float((whole(part) - picture).norm() / picture.norm())}
    yield "guarded", sample(replace(first_block, guard="worst frame"), mine, True, group)[0]
    yield "each for itself", alone(first_block, mine)[0]
    yield "in a group", sample(first_block, mine, False, group)[0]
    changes = lambda step: "prompt" if rank < world - 1 or step < 6 else "another"  # noqa: E731
    yield "new on one rank", sample(first_block, mine, False, group, prompt=changes)[0]
    yield "apart", sample(TaylorSeerCache(cache_interval=3, cache_level="model"), mine, False, group, prompt=changes)[0]
    misread = rehearsal.relative_error
    rehearsal.relative_error = (lambda *_: 1.0) if rank == world - 1 else misread
    yield "misread on one rank", sample(first_block, mine, True, group)[0]
    rehearsal.relative_error = misread
    attention = mine.shape[1] * W * 4  # bytes that one attention gives
    free = 2.5 * attention if rank == world - 1 else 1e9
    yield "little memory on one rank", sample(BROADCAST, mine, True, group, free)[0]
    limited = replace(BROADCAST, memory_limit_gb=4 * 2.6 * W * 4 / 2**30)  # four times two tokens fit, three do not
    yield "a token more on some ranks", sample(limited, mine, True, group)[0]
    alike = Ranks(group).are_alike("same", mine.device), Ranks(group).are_alike(rank == 1, mine.device)
    yield "alike", {"actions": [], "alike": alike}
    some = torch.tensor([1.0, float("nan") if rank == 1 else 2.0])
    numbers = Ranks(group).largest([rank, some[1]], some.device)
    yield "numbers", {"total": Ranks(group).total(some).tolist(), "largest": numbers, "given": some[0].item()}


def main(rank, world, store, result):
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    Path(result).write_text(json.dumps(dict(jobs(rank, world))))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # without finalising: torch's own threads now and then end a rank with std::terminate there


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
