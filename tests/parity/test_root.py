"""The hook on the root: it comes and goes without a trace, and gets along with others in diffusers' registry."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from models import CHROMA, COGVIDEOX, FLUX, LTX, SD3, Clock, called, denoise, diffusers, made
from recording import executions
from torch import nn

from cache_core.adapters.diffusers import apply, cache_context, disable_cache, enable_cache
from cache_core.adapters.diffusers.api import HOOK_NAMES, _name_and_marker
from cache_core.adapters.diffusers.root import RootHook, context_of
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategy.strategy import Strategy

ModelHook, HookRegistry = diffusers.hooks.ModelHook, diffusers.hooks.HookRegistry


def config_of(name, clock=None):
    settings = dict(
        FirstBlockCacheConfig=dict(threshold=0.3),
        TaylorSeerCacheConfig=dict(cache_interval=3, cache_identifiers=[r".*blocks\.\d+\.attn1?$"]),
        PyramidAttentionBroadcastConfig=dict(current_timestep_callback=clock),
        FasterCacheConfig=dict(is_guidance_distilled=True, current_timestep_callback=clock),
    )
    return getattr(diffusers, name)(**settings[name])


class Doubling(nn.Module):
    """A model without CacheMixin, registry or anything."""

    def forward(self, value):
        return value * 2


class Echo:
    """An engine that notes what it is called with, and runs the model again from inside."""

    def __init__(self, model=None):
        self.model, self.seen, self.resets = model, [], 0

    def call(self, forward, args, kwargs, context):
        self.seen.append(context and context.name)
        return self.model(*args, **kwargs) if self.model else forward(*args, **kwargs)

    def reset(self):
        self.resets += 1


class Counting(ModelHook):
    """Someone else's hook."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


def attached(model, engine, name="fbc_leader_block_hook"):
    return RootHook.attached(model, engine, name, marker=diffusers.FirstBlockCacheConfig())


def attached_between_two(model, engine):
    """The registry, our hook, and someone else's on either side."""
    registry, inner, outer = HookRegistry.check_if_exists_or_initialize(model), Counting(), Counting()
    registry.register_hook(inner, "inner")
    hook = attached(model, engine)
    registry.register_hook(outer, "outer")
    return registry, hook, inner, outer


def everything_on(model):
    """What is set on the model and its modules themselves, to compare before and after."""
    return {name: (set(vars(module)), module.forward) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", HOOK_NAMES)
@pytest.mark.parametrize("denoiser", [FLUX, LTX], ids=lambda denoiser: denoiser.name)
def test_remove_leaves_no_trace(denoiser, name):
    model, clock = made(denoiser), Clock()
    before, plain = everything_on(model), denoise(denoiser, made(denoiser), clock)
    handle = apply(model, config_of(name, clock), strict_parity=True)
    assert [key for key in HookRegistry.check_if_exists_or_initialize(model).hooks] == [HOOK_NAMES[name]]
    cached = denoise(denoiser, model, clock)
    handle.remove()
    handle.remove()
    assert everything_on(model) == before
    assert handle.engine is None
    assert torch.equal(denoise(denoiser, model, clock), plain)
    assert not torch.equal(cached, plain)


@pytest.mark.parametrize("name", HOOK_NAMES)
def test_nothing_is_on_the_modules_between_calls(name):
    model, clock = made(FLUX), Clock()
    before = everything_on(model)
    with apply(model, config_of(name, clock), strict_parity=True):
        denoise(FLUX, model, clock, steps=4)
        after = everything_on(model)
    assert {key: value for key, value in after.items() if key} == {key: value for key, value in before.items() if key}


@pytest.mark.parametrize("name", HOOK_NAMES)
def test_the_methods_of_diffusers_work_on_it(name):
    model, clock = made(FLUX), Clock()
    plain = denoise(FLUX, made(FLUX), clock)
    enable_cache(model, config_of(name, clock), strict_parity=True)
    assert model.is_cache_enabled
    first = denoise(FLUX, model, clock)
    assert not torch.equal(first, plain)
    model._reset_stateful_cache()
    assert torch.equal(denoise(FLUX, model, clock), first)
    model.disable_cache()
    assert not model.is_cache_enabled
    assert not {"forward", "_diffusers_hook"} & set(vars(model))
    assert torch.equal(denoise(FLUX, model, clock), plain)
    model.enable_cache(config_of(name, clock))
    model._reset_stateful_cache()
    assert torch.equal(denoise(FLUX, model, clock), first)


def test_a_run_that_ends_in_an_error_leaves_nothing_on_the_modules():
    model, clock = made(FLUX), Clock()
    before = everything_on(model)
    handle = apply(model, config_of("FirstBlockCacheConfig"), strict_parity=True)
    with pytest.raises(ValueError, match="No cache context"):
        called(model, FLUX)
    handle.remove()
    assert everything_on(model) == before
    apply(model, config_of("FirstBlockCacheConfig"), strict_parity=True)
    denoise(FLUX, model, clock, steps=4)


@pytest.mark.parametrize("denoiser", [CHROMA, COGVIDEOX], ids=lambda denoiser: denoiser.name)
def test_a_failed_apply_attaches_nothing(denoiser):
    model = made(denoiser)
    before = everything_on(model)
    bad = diffusers.FirstBlockCacheConfig() if denoiser is CHROMA else diffusers.FasterCacheConfig(tensor_format="?")
    with pytest.raises(ValueError):
        apply(model, bad, strict_parity=True)
    assert everything_on(model) == before
    disable_cache(model)
    assert everything_on(model) == before


def test_enabling_twice_is_an_error_and_disabling_makes_room():
    model = made(SD3)
    enable_cache(model, config_of("TaylorSeerCacheConfig"), strict_parity=True)
    with pytest.raises(ValueError, match=r"^Caching has already been enabled"):
        enable_cache(model, config_of("TaylorSeerCacheConfig"), strict_parity=True)
    disable_cache(model)
    enable_cache(model, config_of("TaylorSeerCacheConfig"), strict_parity=True)


def test_what_diffusers_enabled_counts_as_well():
    model = made(FLUX)
    model.enable_cache(config_of("TaylorSeerCacheConfig"))
    with pytest.raises(ValueError, match=r"^Caching has already been enabled"):
        apply(model, config_of("TaylorSeerCacheConfig"), strict_parity=True)
    disable_cache(model)
    handle = apply(model, config_of("TaylorSeerCacheConfig"), strict_parity=True)
    with pytest.raises(ValueError, match=r"^Caching has already been enabled"):
        model.enable_cache(config_of("TaylorSeerCacheConfig"))
    handle.remove()


def test_strict_parity_takes_configs_of_diffusers_only():
    with pytest.raises(ValueError, match=r"strict_parity.*FirstBlockCacheConfig"):
        apply(made(FLUX), FirstBlockCache(), strict_parity=True)
    with pytest.raises(ValueError, match="is not supported"):
        apply(made(FLUX), diffusers.MagCacheConfig(mag_ratios=[1.0]), strict_parity=True)


def test_a_strategy_of_ours_goes_by_a_name_that_diffusers_removes():
    class Other(Strategy):
        title = "Other"

    for strategy, known in ((FirstBlockCache(), "FirstBlockCacheConfig"), (Other(), "FirstBlockCacheConfig")):
        name, marker = _name_and_marker(strategy)
        assert (name, type(marker).__name__) == (HOOK_NAMES[known], known)


@pytest.mark.parametrize("order", list(permutations(["inner", "ours", "outer"])), ids="-".join)
def test_removing_one_of_three_hooks_leaves_the_others_working(order):
    model, engine = Doubling(), Echo()
    registry, hook, inner, outer = attached_between_two(model, engine)
    left = {"inner": lambda: inner.calls, "ours": lambda: len(engine.seen), "outer": lambda: outer.calls}
    for name in order:
        hook.detach(model) if name == "ours" else registry.remove_hook(name)
        del left[name]
        if name != "ours" and set(left) == {"outer"}:
            break  # the inner one went after ours: diffusers has cut out the outer one itself (W28)
        counts = {key: read() for key, read in left.items()}
        assert model(torch.ones(())) == 2
        assert {key: read() for key, read in left.items()} == {key: count + 1 for key, count in counts.items()}
    assert engine.resets == 1


@pytest.mark.parametrize("removed", ["inner", "outer"])
def test_removed_by_the_registry_it_mends_the_chain_as_well(removed):
    model, engine = Doubling(), Echo()
    registry, _, inner, outer = attached_between_two(model, engine)
    registry.remove_hook(removed)
    model(torch.ones(()))
    registry.remove_hook("fbc_leader_block_hook", recurse=True)
    model(torch.ones(()))
    assert (inner.calls, outer.calls) == ((0, 2) if removed == "inner" else (2, 0))
    assert len(engine.seen) == 1


def test_a_hook_removed_from_below_does_not_come_back():
    model, engine, inner = Doubling(), Echo(), Counting()
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(inner, "inner")
    hook = attached(model, engine)
    registry.remove_hook("inner")
    hook.detach(model)
    assert model(torch.ones(())) == 2
    assert (inner.calls, engine.seen) == (0, [])


def test_a_patch_on_top_of_the_model_stays_when_ours_goes():
    model, engine = Doubling(), Echo()
    hook = attached(model, engine)
    below = model.forward
    model.forward = lambda value: below(value) + 1
    assert model(torch.ones(())) == 3
    hook.detach(model)
    assert model(torch.ones(())) == 3
    assert len(engine.seen) == 1
    assert set(vars(model)) == {*vars(Doubling()), "forward"}


def test_a_patch_that_was_there_before_stays():
    model = Doubling()
    model.forward = patch = lambda value: value * 5
    attached(model, Echo()).detach(model)
    assert model.forward is patch


def test_a_registry_that_was_there_before_or_is_used_by_others_stays():
    model = Doubling()
    registry = HookRegistry.check_if_exists_or_initialize(model)
    attached(model, Echo()).detach(model)
    assert model._diffusers_hook is registry
    other = Doubling()
    hook = attached(other, Echo())
    other._diffusers_hook.register_hook(Counting(), "other")
    hook.detach(other)
    assert list(other._diffusers_hook.hooks) == ["other"]


def test_an_engine_that_runs_the_model_again_gets_through():
    model = Doubling()
    engine = Echo(model)
    attached(model, engine)
    with cache_context(model, "cond"):
        assert model(torch.ones(())) == 2
    assert engine.seen == ["cond"]


def test_an_error_in_the_engine_is_not_held_against_the_next_call():
    model, engine = Doubling(), Echo()
    attached(model, engine)
    with pytest.raises(TypeError):
        model(None)
    model(torch.ones(()))
    assert len(engine.seen) == 2


def test_contexts_reach_a_model_without_cache_mixin_and_nest():
    model, engine = Doubling(), Echo()
    hook = attached(model, engine)
    with cache_context(model, "outer", step_index=3, sigma=0.5):
        with pytest.raises(RuntimeError), cache_context(model, "inner"):
            model(torch.ones(()))
            raise RuntimeError
        model(torch.ones(()))
        assert context_of(model).sigma == 0.5
    model(torch.ones(()))
    hook.detach(model)
    assert engine.seen == ["inner", "outer", None]
    assert context_of(model) is None


def test_a_context_of_a_model_that_is_not_cached_does_no_harm():
    with cache_context(model := Doubling(), "cond"):
        assert model(torch.ones(())) == 2


def test_contexts_of_a_pipeline_reach_the_engine():
    model, engine = made(FLUX), Echo()
    attached(model, engine)
    denoise(FLUX, model, Clock(), steps=2, context=type(model).cache_context)
    assert engine.seen == ["cond", "cond"]


def test_the_end_of_a_run_reaches_the_engine_and_clears_the_context():
    model, engine = made(FLUX), Echo()
    attached(model, engine)
    with cache_context(model, "cond"):
        model._reset_stateful_cache()
        assert context_of(model) is None
    assert engine.resets == 1


def test_disabling_what_is_not_enabled_only_warns(caplog):
    disable_cache(Doubling())
    assert "not enabled" in caplog.text


def test_executions_are_read_below_every_hook():
    model = made(FLUX)
    with executions(model) as ran, apply(model, diffusers.FirstBlockCacheConfig(1e9), strict_parity=True):
        denoise(FLUX, model, Clock(), steps=4)
    assert ran.count("transformer_blocks.0") == 4
    assert ran.count("transformer_blocks.1") == 1
