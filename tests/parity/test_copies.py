"""A deep copy of a transformer that has a cache runs its own weights, with a cache of its own."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from models import FLUX, SD3, WAN, Clock, denoise, diffusers, flow_match, made
from recording import executions

from cache_core.adapters.diffusers import apply, disable_cache, enable_cache
from cache_core.adapters.diffusers.root import RootHook
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

STRATEGIES = [
    FirstBlockCache(residual_diff_threshold=0.5),
    TaylorSeerCache(),
    PyramidAttentionBroadcast(),
    diffusers.FasterCacheConfig(tensor_format="BCFHW", current_timestep_callback=lambda: None),
]


def with_other_weights(model):
    torch.manual_seed(7)
    for weights in model.parameters():
        weights.mul_(0.5)
    return model


@pytest.mark.parametrize("given", STRATEGIES, ids=lambda given: type(given).__name__)
@pytest.mark.parametrize("denoiser", [FLUX, WAN, SD3], ids=lambda denoiser: denoiser.name)
def test_a_copy_runs_its_own_weights(denoiser, given):
    expected = apply(with_other_weights(made(denoiser)), given)
    latent = denoise(denoiser, expected.model, Clock())
    original = made(denoiser)
    apply(original, given)
    denoise(denoiser, original, Clock(), stop_after=8)  # in the middle of a run
    copy = with_other_weights(deepcopy(original))
    with executions(original) as ran, executions(copy) as ran_too:
        assert torch.equal(denoise(denoiser, copy, Clock()), latent)
    assert not ran and len(ran_too) > 50
    report = RootHook.of(copy).engine.report
    assert [call.action for call in report.calls] == [call.action for call in expected.report.calls]


def test_the_original_goes_on_as_if_it_had_not_been_copied():
    model, other = made(FLUX), made(FLUX)
    apply(model, STRATEGIES[1])
    apply(other, STRATEGIES[1])
    with_other_weights(deepcopy(model))
    assert torch.equal(denoise(FLUX, model, Clock()), denoise(FLUX, other, Clock()))


def test_the_copy_follows_the_same_scheduler_and_gives_its_cache_back():
    scheduler, model = flow_match(), made(FLUX)
    plain = denoise(FLUX, made(FLUX), Clock())
    handle = apply(model, STRATEGIES[1], scheduler=scheduler)
    copy = deepcopy(model)
    assert RootHook.of(copy).engine.scheduler is scheduler
    disable_cache(copy)
    assert torch.equal(denoise(FLUX, copy, Clock()), plain) and RootHook.of(model).engine is handle.engine


def test_in_strict_parity_too():
    model = made(FLUX)
    enable_cache(model, diffusers.FirstBlockCacheConfig(threshold=0.2), strict_parity=True)
    copy = with_other_weights(deepcopy(model))
    with executions(model) as ran, executions(copy) as ran_too:
        denoise(FLUX, copy, Clock(), steps=4)
    assert not ran and ran_too


def test_a_model_with_other_hooks_of_diffusers_is_not_copied():
    model = made(FLUX)
    apply(model, STRATEGIES[1])
    model._diffusers_hook.register_hook(diffusers.hooks.ModelHook(), "another")
    with pytest.raises(RuntimeError, match=r"another.*disable_cache"):
        deepcopy(model)
    model._diffusers_hook.remove_hook("another")
    deepcopy(model)
