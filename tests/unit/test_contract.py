"""What every strategy must do, the ones of this package and the ten-line example alike."""

import copy
import weakref
from functools import cache

import pytest
import torch
from toy import (
    NEGATIVE,
    POSITIVE,
    EverySecondStep,
    Sampling,
    Toy,
    alive,
    differing,
    first_latent,
    reference,
    relative_error,
    side_by_side,
    sigmas_of,
    tensors_in,
    traces_on,
    uncached,
)

from cache_core.strategies import all_strategies
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

ON = [
    FirstBlockCache(),
    FirstBlockCache(max_order=0),
    FirstBlockCache(guard="worst frame"),
    FirstBlockCache(residual_diff_threshold=0.3, max_order=2, max_consecutive_cache_hits=2),
    *(TaylorSeerCache(cache_interval=2, cache_level=level) for level in ("output", "model", "block", "module")),
    TaylorSeerCache(cache_level="module", max_order=0, taylor_factors_dtype=torch.bfloat16),
    TaylorSeerCache(spacing="steps", weights="recursion", max_order=2),
    FirstBlockCache(target_speedup=1.6),
    TaylorSeerCache(target_speedup=2.0, cache_level="model"),
    PyramidAttentionBroadcast(),
    PyramidAttentionBroadcast(spatial_attention_block_skip_range=4, spatial_attention_timestep_skip_end=1001),
    FasterCache(),
    FasterCache(spatial_attention_block_skip_range=3, spatial_attention_timestep_skip_end=1001, attention_weight=0.0),
    EverySecondStep(),
]
OFF = [
    FirstBlockCache(residual_diff_threshold=0.0),
    FirstBlockCache(max_consecutive_cache_hits=0),
    TaylorSeerCache(cache_interval=1),
    TaylorSeerCache(cache_interval=1, cache_level="module"),
    TaylorSeerCache(target_speedup=1.0),
    FirstBlockCache(target_speedup=1.0),
    PyramidAttentionBroadcast(spatial_attention_block_skip_range=1),
    FasterCache(spatial_attention_block_skip_range=1, unconditional_batch_skip_range=1),
]


def in_words(strategy):
    settings = vars(strategy)
    changed = [f"{name}={value}" for name, value in settings.items() if value != type(strategy).__dict__.get(name)]
    return "-".join([type(strategy).__name__, *changed])


@cache
def sampled(strategy, layout="joined"):
    """One run of a new toy, shared by the tests that only look at it."""
    sampling = Sampling(Toy(), (strategy,), layout=layout)
    return sampling, sampling.sample(first_latent())


@cache
def alone(name):
    """One of two very different branches, without a cache and without the other."""
    sampling = Sampling(Toy(), None, branches=(name,))
    return side_by_side(sampling, {name: differing(first_latent())[name]})[name]


every_strategy = pytest.mark.parametrize("strategy", ON, ids=in_words)


@pytest.mark.parametrize("kind", all_strategies(), ids=lambda kind: kind.__name__)
def test_every_strategy_of_the_package_is_tested_here(kind):
    assert any(type(strategy) is kind for strategy in ON)
    assert any(type(strategy) is kind for strategy in OFF)


@pytest.mark.parametrize("strategy", OFF, ids=in_words)
def test_off_is_off(toy, strategy):
    sampling = Sampling(toy, (strategy,))
    assert torch.equal(sampling.sample(first_latent()), reference())
    assert toy.runs_of("block") == 12 * 5
    assert not sampling.run.state.terms.strategies
    assert not sampling.run.state.memories


@pytest.mark.parametrize("strategy", OFF, ids=in_words)
def test_off_installs_nothing(toy, strategy):
    seen = []
    toy.head.register_forward_pre_hook(lambda *_: seen.extend(traces_on(toy)))
    Sampling(toy, (strategy,)).sample(first_latent())
    assert seen == []


@every_strategy
def test_it_reuses(strategy):
    sampling, latent = sampled(strategy)
    assert sampling.toy.runs_of(strategy.levels[0]) < 0.8 * 12 * len(sampling.toy.units(strategy.levels[0]))
    assert relative_error(latent, reference()) < 0.05  # doing nothing at all is off by 0.7


@every_strategy
@pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
def test_the_report_counts_what_ran(strategy, layout):
    sampling, _ = sampled(strategy, layout)
    possible = 2 * 12 * len(sampling.toy.units(strategy.levels[0]))  # of each branch in each step
    assert sampling.report.computed_share * possible == pytest.approx(sampling.toy.rows_of(strategy.levels[0]))
    assert sampling.report.count("reused", "forecast") > 0


@every_strategy
def test_a_call_is_computed_when_all_of_it_ran_and_reused_when_some_did_not(toy, strategy):
    sampling, shares = Sampling(toy, (strategy,)), []
    for index in range(12):
        before = toy.runs_of(strategy.levels[0])
        sampling.predict(dict.fromkeys((NEGATIVE, POSITIVE), first_latent() * (1 - index / 20)), index)
        shares.append((toy.runs_of(strategy.levels[0]) - before) / len(toy.units(strategy.levels[0])))
    assert [call.computed_share for call in sampling.report.calls] == pytest.approx(shares)
    assert [call.action == "computed" for call in sampling.report.calls] == [share == 1 for share in shares]


@every_strategy
@pytest.mark.parametrize("layout", ["separate", "alternating"])
def test_split_and_joined_branches_agree(strategy, layout):
    (joined, result), (other, apart) = sampled(strategy), sampled(strategy, layout)
    half = strategy.taylor_factors_dtype if isinstance(strategy, TaylorSeerCache) else None
    tolerance = 2e-3 if half else 1e-5  # float32 sums of other batch sizes; what is stored in bfloat16 may round apart
    torch.testing.assert_close(apart, result, rtol=tolerance, atol=tolerance)
    decided, expected = ({(call.step.index, call.action) for call in one.report.calls} for one in (other, joined))
    assert decided == expected


@every_strategy
@pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
def test_contexts_do_not_mix(toy, strategy, layout):
    sampling = Sampling(toy, (strategy,), layout=layout)
    results = side_by_side(sampling, differing(first_latent()))
    apart = relative_error(results[POSITIVE], results[NEGATIVE])
    for name in results:
        assert relative_error(results[name], alone(name)) < 0.1 < 1 < apart
    assert sampling.report.count("reused", "forecast") > 0


@every_strategy
def test_a_run_after_another_is_like_a_first(toy, strategy):
    Sampling(toy, (strategy,)).sample(first_latent(seed=9))
    assert torch.equal(Sampling(toy, (strategy,)).sample(first_latent()), sampled(strategy)[1])


@every_strategy
def test_nothing_stays_on_the_model(toy, strategy):
    before = [set(vars(module)) for module in toy.modules()]
    Sampling(toy, (strategy,)).sample(first_latent())
    assert [set(vars(module)) for module in toy.modules()] == before
    assert torch.equal(uncached(toy, first_latent()), reference())


@every_strategy
def test_the_state_is_gone_with_the_run(toy, strategy):
    sampling = Sampling(toy, (strategy,))
    for index in range(6):  # later on, attention outside its window is no longer kept
        sampling.predict(dict.fromkeys(sampling.branches, first_latent() * (1 - index / 50)), index)
    kept = [weakref.ref(tensor) for tensor in tensors_in(list(sampling.run.state.memories.values()))]
    assert kept
    del sampling
    assert alive(kept) == 0


@every_strategy
def test_the_latent_given_is_unchanged(toy, strategy):
    latent = first_latent()
    Sampling(toy, (strategy,)).sample(latent)
    assert torch.equal(latent, first_latent())


@every_strategy
def test_a_schedule_of_one_step_is_computed(toy, strategy):
    sampling = Sampling(toy, (strategy,), sigmas=sigmas_of(1))
    assert torch.equal(sampling.sample(first_latent()), uncached(Toy(), first_latent(), sigmas=sigmas_of(1)))
    assert sampling.report.count("computed") == 1


@every_strategy
def test_bfloat16_stays_bfloat16_and_reuses(toy, strategy):
    sampling = Sampling(toy.to(torch.bfloat16), (strategy,))
    latent = sampling.sample(first_latent().bfloat16())
    assert latent.dtype is torch.bfloat16
    assert sampling.report.count("reused", "forecast") > 0
    exact = reference()
    assert relative_error(latent.float(), exact) < 0.06  # bfloat16 alone is off by about 0.01


@every_strategy
def test_settings_survive_a_copy(strategy):
    assert copy.deepcopy(strategy) == strategy
