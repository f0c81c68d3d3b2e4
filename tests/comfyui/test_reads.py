"""The device is waited for once in a model call at most, on schedules of every kind that ComfyUI has."""

import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from zoo import all_architectures

from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

READS = {"item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero", "equal"}
KINDS = {  # by an architecture that has it
    "PixArt": "noise, counted in a table",
    "HunyuanDiT": "velocity, counted in a table",
    "Cosmos 1": "EDM",
    "Stable Audio 1": "velocity, continuous",
    "Stable Diffusion 3": "flow",
    "Flux": "flow with the shift of Flux",
}
STRATEGIES = [
    FirstBlockCache(residual_diff_threshold=1.0, start_percent=0.1, end_percent=0.9),
    TaylorSeerCache(),
    PyramidAttentionBroadcast(),
]


class OurReads(TorchFunctionMode):
    """Counts what makes a number of a tensor on behalf of the core, within ComfyUI's functions too."""

    def __init__(self):
        super().__init__()
        self.by = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in READS and (reader := _reader()):
            self.by[reader] += 1
        return function(*args, **(kwargs or {}))


def _reader():
    """The file of ours that reads, if the nearest beside those of PyTorch and of ComfyUI's schedules is one."""
    frame = sys._getframe(2)
    while "torch" in frame.f_code.co_filename or frame.f_code.co_filename.endswith("model_sampling.py"):
        frame = frame.f_back
    name = frame.f_code.co_filename
    return name if "cache_core" in name else None


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: KINDS[name])
def specimen(request, comfy):
    (architecture,) = [found for found in all_architectures() if found.name == request.param]
    if not architecture.is_here:
        pytest.skip("this ComfyUI does not have it")
    return SimpleNamespace(architecture=architecture, model=architecture.build())


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.title)
def test_a_model_call_waits_once_at_most(specimen, cached, reports, strategy):
    """Was 5 to 73 where sigmas are counted in a table. Beside it: once a run the rehearsal, and the schedule."""
    sample, start = specimen.architecture.sample, specimen.architecture.start(1.0)
    with OurReads() as counting:
        sample(cached(specimen.model, strategy), start, 8, 1.0, 1.0)
    (report,) = reports.all
    assert len(report.calls) == 8
    assert sum(counting.by.values()) <= len(report.calls) + 8, counting.by


def test_the_count_sees_a_read(comfy):
    from cache_core.run.reading import SigmaReading
    from cache_core.strategy.step import Schedule

    with OurReads() as counting:
        assert SigmaReading(torch.ones(1), Schedule([1.0, 0.0])).value == 1
    assert counting.by.total() == 1
