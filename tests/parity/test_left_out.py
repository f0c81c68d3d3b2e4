"""FasterCache on diffusers keeps no attention of a negative prompt that is left out; reuse is as if it did."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from models import QWEN_IMAGE, WAN, WAN_JOINED, Clock, denoise, made

from cache_core.adapters.diffusers import apply
from cache_core.strategies import faster_cache
from cache_core.strategies.faster_cache import FasterCache

FASTER = FasterCache(unconditional_batch_timestep_skip_end=1001, spatial_attention_timestep_skip_end=1001)


def sampled(denoiser, pass_scheduler):
    model, scheduler = made(denoiser), denoiser.scheduler()
    handle = apply(model, FASTER, scheduler=scheduler if pass_scheduler else None)
    latent = denoise(replace(denoiser, scheduler=lambda: scheduler), model, Clock(), steps=12)
    handle.remove()
    return latent, handle.report


@pytest.mark.parametrize("denoiser", [WAN, WAN_JOINED, QWEN_IMAGE], ids=["apart", "joined", "packed"])
@pytest.mark.parametrize(("pass_scheduler", "share"), [(True, 0.5), (False, 1)], ids=["scheduler", "no-scheduler"])
def test_half_is_held_where_the_schedule_is_known(monkeypatch, denoiser, pass_scheduler, share):
    latent, report = sampled(denoiser, pass_scheduler)
    monkeypatch.setattr(faster_cache, "last_beside", lambda *_: None)
    expected, keeping = sampled(denoiser, pass_scheduler)
    assert torch.equal(latent, expected)
    assert [(call.branches, call.action) for call in report.calls] == [
        (call.branches, call.action) for call in keeping.calls
    ]
    assert any("uncond" in call.branches and call.action == "reused" for call in report.calls)
    assert any(call.attention_only for call in report.calls)
    of_guidance = 2 * 4 * prod(denoiser.latent)  # low and high frequencies in float32
    assert report.bytes_held - of_guidance == share * (keeping.bytes_held - of_guidance) > 0
    assert report.bytes_held == report.bytes_foretold
