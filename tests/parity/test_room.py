"""What is free on a device of diffusers, and in main memory instead, as far as PyTorch tells."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import WAN, Clock, denoise, made

from cache_core.adapters.diffusers import apply
from cache_core.adapters.diffusers.room import SHARE, free_away, free_on
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategy.lane import AWAY_SHARE

GIB = 2**30
LIKE_CUDA = SimpleNamespace(  # 24 GiB, of which PyTorch has taken 14 and uses 10, others 4
    mem_get_info=lambda device: (6 * GIB, 24 * GIB),
    memory_reserved=lambda device: 14 * GIB,
    memory_allocated=lambda device: 10 * GIB,
)
METAL = SimpleNamespace(  # of 24 GiB of main memory 16 are for the device
    recommended_max_memory=lambda: 16 * GIB,
    driver_allocated_memory=lambda: 9 * GIB,
    current_allocated_memory=lambda: 8 * GIB,
)


def with_main_memory(monkeypatch, available):
    """psutil says that so many bytes are available; without a number it is not installed."""
    told = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=available))
    monkeypatch.setitem(sys.modules, "psutil", None if available is None else told)  # None: an import fails


@pytest.mark.parametrize("kind", ["cuda", "xpu", "privateuseone"])
def test_what_the_device_has_left_and_what_pytorch_does_not_use_is_free(monkeypatch, kind):
    monkeypatch.setattr(torch, kind, LIKE_CUDA, raising=False)
    assert free_on(torch.device(kind, 0)) == SHARE * (6 + 4) * GIB


@pytest.mark.parametrize(("available", "free"), [(None, 7 + 1), (20, 7 + 1), (3, 3 + 1)])
def test_metal_shares_main_memory(monkeypatch, available, free):
    monkeypatch.setattr(torch, "mps", METAL)
    with_main_memory(monkeypatch, available and available * GIB)
    assert free_on(torch.device("mps")) == SHARE * free * GIB


def test_a_driver_that_does_not_tell_leaves_it_open(monkeypatch):
    def refuse(device):
        raise RuntimeError("The device does not support querying the available free memory.")

    monkeypatch.setattr(torch, "xpu", SimpleNamespace(**vars(LIKE_CUDA) | dict(mem_get_info=refuse)))
    assert free_on(torch.device("xpu")) is None


@pytest.mark.parametrize("kind", ["cpu", "meta", "privateuseone"])
def test_where_pytorch_has_no_such_functions_nobody_knows(kind):
    assert not hasattr(torch, "privateuseone")
    assert free_on(torch.device(kind)) is None and free_away(torch.device(kind)) is None


def test_beside_cuda_half_of_main_memory_may_be_used(monkeypatch):
    with_main_memory(monkeypatch, 40 * GIB)
    assert free_away(torch.device("cuda")) == AWAY_SHARE * 40 * GIB
    assert free_away(torch.device("xpu")) is free_away(torch.device("mps")) is None
    with_main_memory(monkeypatch, None)
    assert free_away(torch.device("cuda")) is None


def test_what_is_free_limits_a_cache(monkeypatch):
    """A Wan of diffusers, on a device that tells as CUDA does."""

    def sampled(free):
        told = dict(mem_get_info=(free, 24 * GIB), memory_reserved=0, memory_allocated=0)
        for name, value in told.items():
            monkeypatch.setattr(torch.cpu, name, lambda device, value=value: value, raising=False)
        model = made(WAN)
        strategy = PyramidAttentionBroadcast(spatial_attention_timestep_skip_end=1001, few_steps="draft")
        scheduler = WAN.scheduler()
        handle = apply(model, strategy, scheduler=scheduler)
        denoise(replace(WAN, scheduler=lambda: scheduler), model, Clock(), steps=10)
        handle.remove()
        return handle.report

    much, little = sampled(24 * GIB), sampled(0)
    assert much.count("reused") > 0 and much.bytes_held > 0
    assert little.count("reused") == 0 and little.bytes_held == 0
    assert any("0 of " in note and "what was free" in note for note in little.notes)
