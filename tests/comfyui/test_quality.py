"""How close cached pictures stay to uncached ones, against simply taking fewer steps, on the trained demo model."""

from functools import cache
from statistics import mean, median

import pytest
import torch

from cache_core.demo.codec import FLUX_SCALE, FLUX_SHIFT, decode
from cache_core.demo.quality import psnr
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

STEPS = 20


@pytest.fixture(scope="module")
def pictures(demo, scenes):
    """Pictures (16, 3, 64, 64) at a flow shift: uncached, with fewer steps, or each one sampled with a strategy."""
    from cache_core.adapters.comfyui import with_cache

    def decoded(latent):
        return decode((latent - FLUX_SHIFT) * FLUX_SCALE)

    @cache
    def plain(shift, steps=STEPS):
        return decoded(demo.sample(demo.shifted(demo.model(), shift), scenes, steps=steps, seed=100))

    def cached(shift, strategy):
        reports, latents = [], []
        model = with_cache(demo.shifted(demo.model(), shift), strategy, lambda report, _: reports.append(report))
        for number, scene in enumerate(scenes):
            latents.append(demo.sample(model, [scene], seed=100 + number))
        return decoded(torch.cat(latents)), reports

    plain.cached = cached
    return plain


def closeness(some, reference):
    return median(map(psnr, some, reference))


def fewer_steps(pictures, shift, share):
    """Closeness of an uncached run of the same cost, between two whole numbers of steps by interpolation."""
    whole, part = int(share * STEPS + 1e-6), share * STEPS - int(share * STEPS + 1e-6)
    below, above = (closeness(pictures(shift, whole + more), pictures(shift)) for more in (0, 1))
    return below + max(part, 0) * (above - below)


@pytest.mark.parametrize(
    ("shift", "interval", "share", "gain"),
    [(1, 2, 0.55, 5), (1, 3, 0.40, 7), (1, 5, 0.30, 4), (3, 3, 0.40, 3), (6, 3, 0.40, 3)],
)
def test_taylorseer_beats_fewer_steps(pictures, shift, interval, share, gain):
    cached, reports = pictures.cached(shift, TaylorSeerCache(cache_interval=interval, max_order=1))
    assert [report.computed_share for report in reports] == [pytest.approx(share)] * len(reports)
    assert closeness(cached, pictures(shift)) >= fewer_steps(pictures, shift, share) + gain


def test_the_published_spacing_loses_to_fewer_steps_on_a_shifted_schedule(pictures):
    published = TaylorSeerCache(cache_interval=3, spacing="steps", weights="recursion")
    cached, _ = pictures.cached(6, published)
    assert closeness(cached, pictures(6)) < fewer_steps(pictures, 6, 0.40)


@pytest.mark.parametrize("shift", [1, 3, 6])
def test_first_block_cache_with_defaults_beats_fewer_steps(pictures, shift):
    """Calls are what papers count. This tiny model's first block is a sixth of it, so blocks are counted too."""
    cached, reports = pictures.cached(shift, FirstBlockCache())
    calls = mean(report.count("computed") / len(report.calls) for report in reports)
    blocks = mean(report.computed_share for report in reports)
    assert calls <= 0.60
    assert closeness(cached, pictures(shift)) >= fewer_steps(pictures, shift, calls) + 6
    assert closeness(cached, pictures(shift)) >= fewer_steps(pictures, shift, blocks) + 3


@pytest.mark.parametrize("shift", [1, 3, 6])
def test_first_block_cache_at_two_fifths_computed_beats_fewer_steps(pictures, shift):
    cached, reports = pictures.cached(shift, FirstBlockCache(residual_diff_threshold=0.3))
    calls = mean(report.count("computed") / len(report.calls) for report in reports)
    assert 0.36 <= calls <= 0.46
    assert closeness(cached, pictures(shift)) >= fewer_steps(pictures, shift, calls) + 3
