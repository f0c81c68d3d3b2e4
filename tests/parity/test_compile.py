"""diffusers' transformers compiled with torch.compile, before or after the cache is put on."""

import logging

import pytest
import torch
from compiling import breaks, counting
from models import FLUX, Clock, denoise, made, without_context

from cache_core.adapters.diffusers import apply, cache_context
from cache_core.strategies.first_block import FirstBlockCache

KINDS = 2  # of blocks: a graph for each, and one more where a stream's strides differ in the first block


@pytest.fixture
def compiler():
    with counting() as compiler:
        yield compiler


def sampled(model, handle):
    model_context = lambda _, branch: cache_context(handle.model, branch)  # noqa: E731
    latent = denoise(FLUX, model, Clock(), steps=8, context=model_context)
    report = handle.report
    report.close()
    handle.engine.reset()
    return latent, report


def ran_before(model):
    """The uncached picture is made first, as pipelines do it: they leave a registry of hooks on the transformer."""
    denoise(FLUX, model, Clock(), steps=2, context=type(model).cache_context)
    return model


def cached(model):
    return apply(model, FirstBlockCache(residual_diff_threshold=1.0))


def blocks_before(model, compiler):
    model.compile_repeated_blocks(backend=compiler)
    return model, cached(model)


def blocks_after(model, compiler):
    handle = cached(model)
    model.compile_repeated_blocks(backend=compiler)
    return model, handle


def whole_before(model, compiler):
    compiled = torch.compile(model, backend=compiler)
    return compiled, cached(compiled)


def whole_after(model, compiler):
    handle = cached(model)
    return torch.compile(model, backend=compiler), handle


def whole_in_place_after(model, compiler):
    handle = cached(model)
    model.compile(backend=compiler)
    return model, handle


@pytest.fixture(scope="module")
def expected():
    with torch.no_grad():
        model = made(FLUX)
        latent, report = sampled(model, cached(model))
    return latent, [call.action for call in report.calls], report.computed_share


@pytest.mark.parametrize("way", [blocks_before, blocks_after, whole_before], ids=lambda way: way.__name__)
@pytest.mark.parametrize("model_of", [lambda model: model, ran_before], ids=["first-run", "ran-before"])
def test_blocks_run_compiled_and_nothing_is_compiled_again(compiler, expected, way, model_of):
    model, handle = way(model_of(made(FLUX)), compiler)
    latent, report = sampled(model, handle)
    assert torch.equal(latent, expected[0])
    assert [call.action for call in report.calls] == expected[1] and report.count("reused", "forecast") >= 4
    assert compiler.runs.total() == pytest.approx(report.computed_share * 6 * len(report.calls))
    graphs = compiler.graphs
    assert torch.equal(sampled(model, handle)[0], expected[0])
    assert compiler.graphs == graphs <= KINDS + 1 and breaks() == 0


@pytest.mark.parametrize("way", [whole_after, whole_in_place_after], ids=lambda way: way.__name__)
def test_compiled_as_a_whole_around_the_cache_it_is_right_and_says_that_it_runs_uncompiled(
    compiler, expected, way, caplog
):
    model, handle = way(made(FLUX), compiler)
    with caplog.at_level(logging.WARNING):
        latent, report = sampled(model, handle)
    assert torch.equal(latent, expected[0]) and [call.action for call in report.calls] == expected[1]
    broken = breaks()
    sampled(model, handle)
    assert breaks() == broken and compiler.graphs == 0
    assert caplog.text.count("compile_repeated_blocks()") == 1


def test_taking_the_cache_off_a_compiled_model_leaves_it_compiled_as_a_whole(compiler):
    model = made(FLUX)
    plain = denoise(FLUX, model, Clock(), steps=4, context=without_context)
    compiled = torch.compile(model, backend=compiler)
    before = dict(vars(compiled)), dict(vars(model))
    handle = cached(compiled)
    sampled(compiled, handle)
    handle.remove()
    assert (dict(vars(compiled)), dict(vars(model))) == before
    runs = compiler.runs.total()
    latent = denoise(FLUX, compiled, Clock(), steps=4, context=without_context)
    assert torch.equal(latent, plain) and compiler.runs.total() >= runs + 4


def test_contexts_and_the_end_of_a_pipeline_reach_the_cache_on_what_was_compiled_after_a_first_run(compiler, expected):
    model = ran_before(made(FLUX))
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    handle = cached(compiled)
    latent = denoise(FLUX, compiled, Clock(), steps=8, context=lambda _, branch: model.cache_context(branch))
    assert torch.equal(latent, expected[0])
    model._reset_stateful_cache()
    assert handle.report.state == "finished" and {call.branches for call in handle.report.calls} == {("cond",)}
    assert handle.report.count("reused", "forecast") >= 4
    handle.remove()
    assert model._diffusers_hook._module_ref is model and not model._diffusers_hook.hooks


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("order", ["compiled-first", "cached-first"])
@pytest.mark.parametrize("model_of", [lambda model: model, ran_before], ids=["first-run", "ran-before"])
def test_compiled_in_place_it_is_right_or_says_what_works(compiler, expected, order, fullgraph, model_of, caplog):
    model = model_of(made(FLUX))
    if order == "compiled-first":
        model.compile(backend=compiler, fullgraph=fullgraph)
    handle = cached(model)
    if order == "cached-first":
        model.compile(backend=compiler, fullgraph=fullgraph)
    if not fullgraph:
        assert torch.equal(sampled(model, handle)[0], expected[0])
        assert caplog.text.count("compile_repeated_blocks()") == 1
        return
    with pytest.raises(Exception, match=r"Compile its blocks instead: transformer\.compile_repeated_blocks\(\)"):
        sampled(model, handle)
