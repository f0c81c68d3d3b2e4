"""Beside the caches of ComfyUI's own that keep keys and values: what is self-attention there is taken for that."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from zoo import all_architectures
from zoo.cases import ALWAYS, OFF, name_of
from zoo.prompts import nothing, reference, text
from zoo.sampling import distance

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

STEPS = 8
DRAFT = dict(few_steps="draft")
ATTENTION = [
    PyramidAttentionBroadcast(**DRAFT, **ALWAYS),
    FasterCache(unconditional_batch_skip_range=1, **DRAFT, **ALWAYS),
]
WHOLE = [
    FirstBlockCache(residual_diff_threshold=1.0),
    TaylorSeerCache(cache_interval=2, **DRAFT),
    TaylorSeerCache(cache_interval=2, cache_level="model", **DRAFT),
    TaylorSeerCache(cache_interval=2, cache_level="block", **DRAFT),
    TaylorSeerCache(cache_interval=2, cache_level="module", **DRAFT),
]


def titled(strategy):
    return f"{name_of(strategy)}-{getattr(strategy, 'cache_level', '')}".rstrip("-")


def specimen(name, node, cfg, **changes):
    """A model of the zoo, ComfyUI's own cache for it, and its sampling along a short way in noise."""
    (architecture,) = [found for found in all_architectures() if found.name == name]
    if not architecture.is_here:
        pytest.skip("this ComfyUI does not have it")
    architecture = replace(architecture, **changes)
    return SimpleNamespace(
        model=architecture.build(),
        node=node,
        sample=lambda model, steps=STEPS: architecture.sample(model, architecture.content(), steps, cfg, 0.3),
        known={},
    )


@pytest.fixture(scope="module")
def flux(comfy):
    """Flux2 with a reference picture. At cfg above 1 ComfyUI's node fails on it, with a cache and without."""
    nodes = pytest.importorskip("comfy_extras.nodes_flux")
    if not hasattr(nodes, "FluxKVCache"):
        pytest.skip("this ComfyUI does not have FluxKVCache")
    return specimen(
        "Flux2",
        lambda model: nodes.FluxKVCache.execute(model).result[0],
        cfg=1.0,
        prompt=text(48, tokens=64, pooled_output=nothing, reference_latents=reference(1, 128, 8, 8)),
    )


@pytest.fixture(scope="module")
def animate(comfy):
    nodes = pytest.importorskip("comfy_extras.nodes_wan")
    if not hasattr(nodes, "WanAnimate2Cache"):
        pytest.skip("this ComfyUI does not have WanAnimate2Cache")
    return specimen("Wan-Animate 2", lambda model: nodes.WanAnimate2Cache.execute(model, "cpu").result[0], cfg=3.0)


@pytest.fixture(params=["flux", "animate"])
def beside(request):
    return request.getfixturevalue(request.param)


def alone(beside, node=True, steps=STEPS):
    """The latent without a cache of ours, and with ComfyUI's node or without; sampled once."""
    if (node, steps) not in beside.known:
        model = beside.node(beside.model) if node else beside.model
        beside.known[node, steps] = beside.sample(model, steps)
    return beside.known[node, steps]


def both(beside, cached, strategy, order):
    if order == "cache last":
        return cached(beside.node(beside.model), strategy)
    return beside.node(cached(beside.model, strategy))


by_order = pytest.mark.parametrize("order", ["cache last", "cache first"])


@by_order
@pytest.mark.parametrize("strategy", OFF, ids=name_of)
def test_off_settings_change_nothing(beside, cached, strategy, order):
    assert torch.equal(beside.sample(both(beside, cached, strategy, order), 3), alone(beside, steps=3))


@by_order
@pytest.mark.parametrize("strategy", ATTENTION, ids=name_of)
def test_attention_is_reused_beside_keys_that_were_kept(beside, cached, reports, strategy, order):
    latent = beside.sample(both(beside, cached, strategy, order))
    (report,) = reports.all
    assert report.count("reused", "forecast") >= STEPS // 2 - 1, report.notes
    assert report.computed_share < 0.75
    assert 0 < distance(latent, alone(beside)) < 0.1 * alone(beside).norm()


@by_order
@pytest.mark.parametrize("strategy", WHOLE, ids=titled)
def test_blocks_and_outputs_are_reused_beside_keys_that_were_kept(beside, cached, reports, strategy, order):
    latent = beside.sample(both(beside, cached, strategy, order))
    (report,) = reports.all
    assert report.count("reused", "forecast") >= 2, report.notes
    assert 0 < distance(latent, alone(beside)) < 0.1 * alone(beside).norm()


@pytest.mark.parametrize("strategy", [*ATTENTION, *WHOLE[3:]], ids=titled)
def test_the_picture_of_wan_animate_2_is_cached_without_comfyuis_own_cache_too(animate, cached, reports, strategy):
    latent = animate.sample(cached(animate.model, strategy))
    (report,) = reports.all
    assert report.count("reused", "forecast") >= STEPS // 2 - 1, report.notes
    assert 0 < distance(latent, alone(animate, node=False)) < 0.1 * latent.norm()


def pooled(q, k, v, **_):
    """Keys and values of two tokens in one, as where they are compressed."""
    return {
        "q": q,
        **{
            name: kept[:, :, : 2 * (kept.shape[2] // 2)].unflatten(2, (-1, 2)).mean(3)
            for name, kept in (("k", k), ("v", v))
        },
    }


def cut(q, k, v, **_):
    """Without the last keys, as where attention is sparse."""
    return {"q": q, "k": k[:, :, :-8], "v": v[:, :, :-8]}


@by_order
@pytest.mark.parametrize("patch", [pooled, cut])
@pytest.mark.parametrize("strategy", ATTENTION, ids=name_of)
def test_self_attention_stays_that_whatever_number_of_keys_a_patch_leaves(
    demo, cached, reports, patch, strategy, order
):
    pytest.importorskip("comfy_extras.nodes_flux")

    def patched(model):
        clone = model.clone()
        clone.set_model_attn1_patch(patch)
        return clone

    prompt, plain = ["a big red ball at the center on a blue striped background"], demo.model()
    expected = demo.sample(patched(plain), prompt, steps=12)
    if torch.equal(expected, demo.sample(plain, prompt, steps=12)):
        pytest.skip("this ComfyUI does not ask for such patches")
    model = cached(patched(plain), strategy) if order == "cache last" else patched(cached(plain, strategy))
    latent = demo.sample(model, prompt, steps=12)
    (report,) = reports.all
    assert report.count("reused", "forecast") >= 5, report.notes
    assert 0 < distance(latent, expected) < 0.2 * expected.norm()
