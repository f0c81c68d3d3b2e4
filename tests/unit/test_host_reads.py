"""The host waits for the device at most once in a model call. Counted at the tensor's own methods, on any device."""

from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from toy import PICTURE, GuidedSampling, Sampling, first_latent

from cache_core.run.reading import SigmaReading
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "nonzero",
    "__array__",
    "equal",
}
STRATEGIES = [
    FirstBlockCache(),
    FirstBlockCache(max_order=0),
    FirstBlockCache(start_percent=0.2, end_percent=0.8),
    *(TaylorSeerCache(cache_level=level) for level in ("output", "model", "block", "module")),
    TaylorSeerCache(weights="recursion", spacing="steps"),
    PyramidAttentionBroadcast(),
    FasterCache(),
]


class CountingReads(TorchFunctionMode):
    """Counts the calls that make a number of a tensor."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.reads += getattr(function, "__name__", "") in READS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", [float, bool, int, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu])
def test_the_count_sees_every_kind_of_read(read):
    with CountingReads() as counting:
        read(torch.ones(()))
    assert counting.reads == 1


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.title}-{s.levels[0]}")
@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_a_model_call_reads_at_most_one_number(toy, strategy, layout):
    """But for the call in which the block plan is rehearsed, once a run: that reads two more."""
    sampling, calls = Sampling(toy, (strategy,), layout=layout), 1 if layout == "joined" else 2
    rehearsed = strategy.levels[0] == "model"
    for index in range(12):
        with CountingReads() as counting:
            sampling.predict(dict.fromkeys(sampling.branches, first_latent() * (1 - index / 50)), index)
        assert counting.reads <= calls + 2 * (rehearsed and index == 0)
    assert sampling.report.count("reused", "forecast") > 0


@pytest.mark.parametrize(
    "strategies",
    [
        (FasterCache(unconditional_batch_timestep_skip_end=1001),),
        (FasterCache(spatial_attention_block_skip_range=1),),
        (TaylorSeerCache(cache_level="output"), FasterCache()),
    ],
    ids=["attention-and-guidance", "guidance", "with-another"],
)
@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_guidance_shares_its_read_with_the_model_calls_inside(toy, strategies, layout):
    sampling = GuidedSampling(toy, strategies, layout=layout)
    for index in range(12):
        latent = first_latent(tokens=PICTURE[0] * PICTURE[1]) * (1 - index / 50)
        with CountingReads() as counting:
            sampling.predict(dict.fromkeys(sampling.branches, latent), index)
        assert counting.reads <= 1
    assert sampling.toy.rows < 2 * 12


def test_a_sigma_that_is_known_is_not_read(toy):
    sampling = GuidedSampling(toy, (FasterCache(),))
    begin = sampling.run.begin_evaluation
    for index, sigma in enumerate(sampling.sigmas[:-1]):
        sampling.run.begin_evaluation = partial(
            begin, SigmaReading(torch.tensor(sigma), sampling.run.state.terms.schedule, value=sigma)
        )
        latents = dict.fromkeys(sampling.branches, first_latent(tokens=PICTURE[0] * PICTURE[1]))
        with CountingReads() as counting:
            sampling.predict(latents, index)
            sampling.call(latents, sigma, sampling.branches)  # after the guidance too
        assert counting.reads == 0
    assert sampling.report.count("reused", "forecast") > 0


def test_settings_that_never_reuse_read_nothing(toy):
    with CountingReads() as counting:
        Sampling(toy, (TaylorSeerCache(cache_interval=1),)).sample(first_latent())
    assert counting.reads == 0
