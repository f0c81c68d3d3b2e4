"""The strategies on CUDA, in bfloat16: they reuse, decide as on the CPU and wait for the device once a call.

Where there is none, what can be tested without one runs on the CPU.
"""

import warnings
from dataclasses import dataclass

import pytest
import torch
from toy import PICTURE, GuidedSampling, ReuseAlways, Toy, first_latent, relative_error, tensors_in

from cache_core import COMPUTE
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.tensors import relative_change

cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the same tests run on the CPU"),
    ],
)
ALL_ALONG = dict(spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=1001)
STRATEGIES = [
    FirstBlockCache(),
    FirstBlockCache(max_order=0),
    *(TaylorSeerCache(cache_level=level, cache_interval=2) for level in ("output", "model", "block", "module")),
    PyramidAttentionBroadcast(**ALL_ALONG),
    FasterCache(**ALL_ALONG, unconditional_batch_skip_range=1),
    FasterCache(spatial_attention_block_skip_range=1),
    FasterCache(**ALL_ALONG),
]


def levels_of(strategy):
    return [level for level in strategy.levels if strategy.works_at(level)]


each_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: "-".join([s.title, *levels_of(s)]))
on_each_device = pytest.mark.parametrize("device", ["cpu", cuda])


class OnDevice(GuidedSampling):
    """Sampling of pictures whose sigmas are on the latent's device, as ComfyUI's are."""

    def predict(self, latents, index):
        with torch.device(next(iter(latents.values())).device):
            return super().predict(latents, index)


def first_picture(device, dtype):
    return first_latent(tokens=PICTURE[0] * PICTURE[1]).to(device, dtype)


def sampled(strategy, device, dtype):
    sampling = OnDevice(Toy().to(device, dtype), (strategy,))
    return sampling, sampling.sample(first_picture(device, dtype))


@each_strategy
@on_each_device
def test_it_reuses_in_bfloat16(strategy, device):
    sampling, latent = sampled(strategy, device, torch.bfloat16)
    units = ["output" if level == "guidance" else level for level in levels_of(strategy)]
    everything = sum(2 * 12 * len(sampling.toy.units(level)) for level in units)  # two branches, twelve steps
    assert latent.dtype is torch.bfloat16 and latent.isfinite().all()
    assert sampling.report.count("reused", "forecast") > 0
    assert sum(map(sampling.toy.rows_of, units)) < everything


@each_strategy
@on_each_device
def test_it_decides_as_on_the_cpu(strategy, device):
    on_device, latent = sampled(strategy, device, torch.float32)
    on_cpu, expected = sampled(strategy, "cpu", torch.float32)
    assert [call.action for call in on_device.report.calls] == [call.action for call in on_cpu.report.calls]
    assert relative_error(latent.cpu(), expected) < 1e-3  # matrix products round otherwise


@each_strategy
@on_each_device
def test_what_it_keeps_stays_on_the_device(strategy, device):
    sampling = OnDevice(Toy().to(device), (strategy,))
    for index in range(6):
        sampling.predict(dict.fromkeys(sampling.branches, first_picture(device, torch.float32)), index)
    kept = list(tensors_in([memory.state for memory in sampling.run.state.memories.values()]))
    assert kept and {tensor.device.type for tensor in kept} == {device}


@each_strategy
@on_each_device
def test_where_the_device_has_no_memory_left_the_run_goes_on_without_a_cache(strategy, device):
    sampling, calls = OnDevice(Toy().to(device), (strategy,)), []

    def ask_for_too_much(*_):
        calls.append(1)
        if len(calls) == 4:
            torch.empty(2**50, device=device)

    sampling.toy.head.register_forward_pre_hook(ask_for_too_much)
    latent = sampling.sample(first_picture(device, torch.float32))
    assert len(calls) > 4 and latent.isfinite().all()
    assert sum("memory ran out" in note for note in sampling.report.notes) == 1
    assert sampling.run.state.terms.strategies == () and not sampling.run.state.memories


@each_strategy
@pytest.mark.parametrize("layout", ["joined", "separate"])
@pytest.mark.parametrize("device", [cuda])
def test_a_model_call_waits_for_the_device_at_most_once(strategy, layout, device):
    sampling = OnDevice(Toy().to(device, torch.bfloat16), (strategy,), layout=layout)
    latents = dict.fromkeys(sampling.branches, first_picture(device, torch.bfloat16))
    calls = 1 if layout == "joined" else 2
    waits = [waits_of(sampling, latents, index) / calls for index in range(12)]
    assert max(waits[3:]) <= 1  # the first evaluations allocate and learn
    assert sampling.report.count("reused", "forecast") > 0


def waits_of(sampling, latents, index):
    """How often one evaluation waits for the device."""
    latents = {name: latent * (1 - index / 50) for name, latent in latents.items()}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sampling.predict(latents, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@dataclass(frozen=True)
class LooksAtTheStepFirst(ReuseAlways):
    """Reads the step before it measures, at several sites of one call."""

    def around(self, call, state):
        if call.may_reuse and call.step.index > 1 and call.measured(lambda time: relative_change(time + 1, time)) > 0:
            return state.combined([1.0])
        state.add(call.step.time, (yield COMPUTE))


@pytest.mark.parametrize("level", ["output", "model", "block"])
@on_each_device
def test_a_step_may_be_read_before_a_measure(level, device):
    sampling, _ = sampled(LooksAtTheStepFirst(level), device, torch.float32)
    assert sampling.report.count("reused") > 0


@on_each_device
def test_calls_are_timed_on_the_device(device):
    sampling, _ = sampled(FirstBlockCache(), device, torch.float32)
    assert all(call.seconds > 0 for call in sampling.report.calls)
