"""How close cached pictures stay to uncached ones, against simply taking fewer steps, on the trained demo model."""

from functools import cache
from statistics import mean, median
from types import SimpleNamespace

import pytest
import torch
from conftest import Reports

from cache_core.compare.quality import psnr
from cache_core.demo.codec import FLUX_SCALE, FLUX_SHIFT, decode
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

STEPS = 20
SEED = 100


@pytest.fixture(scope="module")
def pictures(demo, scenes):
    """Pictures (count, 3, 64, 64) at a flow shift: uncached, or with a strategy; sampled in one batch or one by one."""
    from cache_core.adapters.comfyui import with_cache

    def decoded(latent):
        return decode((latent - FLUX_SHIFT) * FLUX_SCALE)

    @cache
    def plain(shift, count, steps=STEPS):
        return decoded(demo.sample(demo.shifted(demo.model(), shift), scenes(count), steps=steps, seed=SEED))

    def cached(shift, count, strategy, one_by_one):
        reports = Reports()
        model = with_cache(demo.shifted(demo.model(), shift), strategy, watch=reports.watch)
        batches = [[scene] for scene in scenes(count)] if one_by_one else [scenes(count)]
        latents = [demo.sample(model, batch, seed=SEED + number) for number, batch in enumerate(batches)]
        return decoded(torch.cat(latents)), reports.all

    return SimpleNamespace(plain=plain, cached=cached)


def closeness(some, reference):
    return median(map(psnr, some, reference))


def fewer_steps(pictures, shift, count, share):
    """Closeness of an uncached run of the same cost, between two whole numbers of steps by interpolation."""
    reference, whole = pictures.plain(shift, count), int(share * STEPS + 1e-6)
    below, above = (closeness(pictures.plain(shift, count, whole + more), reference) for more in (0, 1))
    return below + max(share * STEPS - whole, 0) * (above - below)


@pytest.mark.parametrize(
    ("shift", "interval", "share", "gain"),
    [(1, 2, 0.55, 5), (1, 3, 0.40, 7), (1, 5, 0.30, 4), (3, 3, 0.40, 3), (6, 3, 0.40, 3)],
)
def test_taylorseer_beats_fewer_steps(pictures, shift, interval, share, gain):
    """Its steps are planned, the same for all pictures, so that many can be sampled in one batch."""
    cached, (report,) = pictures.cached(shift, 48, TaylorSeerCache(cache_interval=interval), one_by_one=False)
    assert report.computed_share == pytest.approx(share)
    assert closeness(cached, pictures.plain(shift, 48)) >= fewer_steps(pictures, shift, 48, share) + gain


def test_the_published_spacing_loses_to_fewer_steps_on_a_shifted_schedule(pictures):
    published = TaylorSeerCache(cache_interval=3, spacing="steps", weights="recursion")
    cached, _ = pictures.cached(6, 48, published, one_by_one=False)
    assert closeness(cached, pictures.plain(6, 48)) < fewer_steps(pictures, 6, 48, 0.40)


@pytest.mark.parametrize("shift", [1, 3, 6])
def test_first_block_cache_with_defaults_beats_fewer_steps(pictures, shift):
    """Calls are what papers count. This tiny model's first block is a sixth of it, so blocks are counted too."""
    cached, reports = pictures.cached(shift, 16, FirstBlockCache(), one_by_one=True)
    calls = mean(report.count("computed") / len(report.calls) for report in reports)
    blocks = mean(report.computed_share for report in reports)
    assert calls <= 0.60
    assert closeness(cached, pictures.plain(shift, 16)) >= fewer_steps(pictures, shift, 16, calls) + 6
    assert closeness(cached, pictures.plain(shift, 16)) >= fewer_steps(pictures, shift, 16, blocks) + 3


@pytest.mark.parametrize("shift", [1, 3, 6])
def test_first_block_cache_at_two_fifths_computed_beats_fewer_steps(pictures, shift):
    cached, reports = pictures.cached(shift, 16, FirstBlockCache(residual_diff_threshold=0.3), one_by_one=True)
    calls = mean(report.count("computed") / len(report.calls) for report in reports)
    assert 0.36 <= calls <= 0.46
    assert closeness(cached, pictures.plain(shift, 16)) >= fewer_steps(pictures, shift, 16, calls) + 3
