"""The strategies on CUDA tensors, in bfloat16: they reuse, decide as on the CPU and wait for the device once a call."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from toy import ReuseAlways, Sampling, Toy, first_latent, relative_error

from cache_core import COMPUTE
from cache_core.features import relative_change
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: the same code runs on the CPU in the other tests"
    ),
]
STRATEGIES = [
    FirstBlockCache(),
    FirstBlockCache(max_order=0),
    *(TaylorSeerCache(cache_level=level, cache_interval=2) for level in ("output", "model", "block", "module")),
]
on_cuda = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.title}-{s.levels[0]}")


class OnDevice(Sampling):
    """Sampling whose sigmas are on the latent's device, as ComfyUI's are."""

    def call(self, latents, sigma, names):
        with torch.device(next(iter(latents.values())).device):
            return super().call(latents, sigma, names)


def sampled(strategy, device, dtype):
    sampling = OnDevice(Toy().to(device, dtype), (strategy,))
    return sampling, sampling.sample(first_latent().to(device, dtype))


@on_cuda
def test_it_reuses_in_bfloat16(strategy):
    sampling, latent = sampled(strategy, "cuda", torch.bfloat16)
    assert latent.dtype is torch.bfloat16
    assert sampling.report.count("reused", "forecast") > 0
    assert sampling.toy.runs_of(strategy.levels[0]) < 12 * len(sampling.toy.units(strategy.levels[0]))


@on_cuda
def test_it_decides_as_on_the_cpu(strategy):
    on_device, latent = sampled(strategy, "cuda", torch.float32)
    on_cpu, expected = sampled(strategy, "cpu", torch.float32)
    assert [call.action for call in on_device.report.calls] == [call.action for call in on_cpu.report.calls]
    assert relative_error(latent.cpu(), expected) < 1e-3  # matrix products round otherwise


@on_cuda
@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_a_model_call_waits_for_the_device_at_most_once(strategy, layout):
    sampling = OnDevice(Toy().to("cuda", torch.bfloat16), (strategy,), layout=layout)
    latents = dict.fromkeys(sampling.branches, first_latent().to("cuda", torch.bfloat16))
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
def test_a_step_may_be_read_before_a_measure(level):
    sampling, _ = sampled(LooksAtTheStepFirst(level), "cuda", torch.float32)
    assert sampling.report.count("reused") > 0


def test_calls_are_timed_on_the_device():
    sampling, _ = sampled(FirstBlockCache(), "cuda", torch.float32)
    assert all(call.seconds > 0 for call in sampling.report.calls)
