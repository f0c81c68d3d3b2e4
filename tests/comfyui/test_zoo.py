"""Every diffusion transformer that ComfyUI has, with every strategy: the same promises for all.

`-k Qwen` cuts it to one architecture. `--write-models` writes docs/models.md from what was measured. Of whom a claim is
made is in zoo/cases.py; how a model is sampled, and what is counted meanwhile, in zoo/sampling.py.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from zoo import all_architectures, cases, replay
from zoo.cases import AGGRESSIVE, OFF, for_each, for_each_case, name_of
from zoo.completeness import NO_DENOISERS, fewest_files, model_files
from zoo.sampling import STEPS, distance, equal, lists_in, specimen_of
from zoo.table import Row, rows_in, written
from zoo.wan import frame_by_frame

from cache_core.strategies import all_strategies
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

MODELS = Path(__file__).parents[2] / "docs" / "models.md"
each_off = pytest.mark.parametrize("strategy", OFF, ids=name_of)
each_strategy = pytest.mark.parametrize("strategy", AGGRESSIVE, ids=name_of)
each_cfg = pytest.mark.parametrize("cfg", [1.0, 3.0])


@pytest.fixture(scope="module")
def specimen(request, comfy):
    yield from specimen_of(request.param)


@pytest.fixture(scope="module")
def specimen_in_half_precision(request, comfy):
    yield from specimen_of(request.param, torch.bfloat16)


@pytest.fixture(scope="module")
def refined(request, specimen):
    """What came out with a strategy and without."""
    case = request.param
    return SimpleNamespace(plain=specimen.refined(None, case.cfg), cached=specimen.refined(case.strategy, case.cfg))


@pytest.fixture(scope="module")
def replayed(request, specimen):
    """The same inputs several times, the last time reused."""
    return replay.replayed(specimen, request.param.to(specimen.model), replay.Replay(probes=request.param.probes))


@pytest.fixture(scope="module")
def with_addition(request, specimen):
    """What came out with something beside the blocks, cached and not."""
    return specimen.with_addition(request.param.to, TaylorSeerCache(cache_interval=2, few_steps="draft"))


@for_each(cases.EVERY)
@each_off
@each_cfg
def test_off_is_off(specimen, strategy, cfg):
    plain = specimen.sampled(None, cfg, steps=3)  # first: where that fails, an older ComfyUI is to blame
    assert equal(specimen.sampled(strategy, cfg, steps=3).latent, plain.latent)


@for_each(cases.EVERY)
def test_the_right_lists_of_blocks_are_found(specimen):
    report = specimen.sampled(cases.NEVER_MET).report
    assert lists_in(report) == specimen.architecture.chains, report.notes


@for_each(cases.WITHOUT_BLOCKS)
def test_where_no_list_of_blocks_is_found_the_report_says_so(specimen):
    notes = specimen.sampled(cases.NEVER_MET).report.notes
    assert any("no chain of blocks was found" in note for note in notes)


@for_each(cases.EVERY)
def test_measuring_changes_nothing(specimen):
    measured = specimen.sampled(cases.NEVER_MET)
    assert equal(measured.latent, specimen.sampled(None).latent)
    assert measured.report.count("reused", "forecast") == 0


@for_each(cases.WITH_BLOCKS)
def test_the_measure_is_taken_on_what_changes(specimen):
    measures = specimen.sampled(cases.NEVER_MET).measures
    assert len(measures) >= STEPS - 3
    assert min(measures) > 1e-4 and max(measures) > 1.2 * min(measures)


@for_each_case("refined", cases.REUSING)
def test_it_reuses(refined):
    assert refined.cached.report.count("reused", "forecast") > 0, refined.cached.report.notes


@for_each_case("refined", cases.REUSING)
def test_reuse_changes_the_latent_and_keeps_it_finite(refined):
    assert refined.cached.is_finite
    assert not equal(refined.cached.latent, refined.plain.latent)


@for_each(cases.EVERY_THIRD_WITH_BLOCKS)
def test_a_wished_speed_up_is_met_whatever_the_model_does_around_its_blocks(specimen):
    plain = specimen.sampled(None, steps=12)
    for strategy in (TaylorSeerCache(cache_level="model", target_speedup=1.5), FirstBlockCache(target_speedup=1.3)):
        run = specimen.sampled(strategy, steps=12)
        assert run.report.count("reused", "forecast") > 0 and run.is_finite
        # half a step of twelve, and the rehearsal of tiny models, which are to a large part what is around their blocks
        assert abs(run.flops / plain.flops - 1 / strategy.target_speedup) < 0.1


@for_each_case("refined", cases.REUSING)
def test_reuse_saves_work(refined):
    assert refined.cached.flops < refined.plain.flops


@for_each_case("refined", cases.LEAVING_OUT_BLOCKS)
def test_at_most_half_of_the_blocks_run_that_can_be_left_out(refined, specimen):
    chains, (strategy,) = specimen.architecture.chains, refined.cached.report.strategies
    first, main = f"{chains[0]}.0", chains[-1]
    always = refined.plain.blocks[first] if strategy.tests_first_block and main == chains[0] else 0
    assert refined.cached.runs_in(main) - always <= 0.5 * (refined.plain.runs_in(main) - always)
    assert refined.cached.report.count("reused", "forecast") >= 0.5 * len(refined.cached.report.calls)


@for_each_case("refined", cases.NOT_REUSING)
def test_where_nothing_can_be_reused_nothing_changes(refined):
    assert equal(refined.cached.latent, refined.plain.latent)


@for_each_case("refined", cases.NOT_REUSING)
def test_where_nothing_can_be_reused_the_report_says_why(refined):
    assert refined.cached.report.notes


@for_each(cases.EVERY)
@each_strategy
def test_no_trace_stays_on_a_module(specimen, strategy):
    specimen.refined(strategy)
    assert specimen.traces() == specimen.before


@for_each(cases.EVERY)
@each_strategy
def test_no_tensor_of_the_cache_outlives_the_run(specimen, strategy):
    assert specimen.refined(strategy).still_held() == []


@for_each(cases.EVERY)
@pytest.mark.parametrize("strategy", [cases.NEVER_MET, *AGGRESSIVE[1:]], ids=name_of)
def test_held_is_foretold(specimen, strategy):
    run = specimen.sampled if strategy is cases.NEVER_MET else specimen.refined  # as others have run it already
    if steps := cases.STEPS_TO_HOLD_ALL.get((specimen.architecture.name, name_of(strategy))):
        run = partial(specimen.sampled, denoise=0.1, steps=steps)
    report = run(strategy).report
    assert 0.95 * report.bytes_foretold <= report.bytes_held <= 1.05 * report.bytes_foretold, report.notes


@for_each(cases.UNLIKE_EACH_OTHER)
@pytest.mark.parametrize("level", ["model", "block", "module"])
def test_held_is_foretold_along_the_blocks_and_inside_of_them(specimen, level):
    strategy = replace(AGGRESSIVE[1], cache_level=level)
    assert strategy.works_at(level)
    report = specimen.refined(strategy).report
    assert report.count("forecast") > 0 < report.bytes_held, report.notes
    assert 0.95 * report.bytes_foretold <= report.bytes_held <= 1.05 * report.bytes_foretold, report.notes


@for_each(cases.WITH_BLOCKS)
def test_where_all_is_reused_no_more_is_held_than_foretold(specimen):
    report = specimen.refined(AGGRESSIVE[0]).report  # First Block Cache: fewer calls are computed than it can hold
    assert 0 < report.bytes_held <= 1.05 * report.bytes_foretold, report.notes


@for_each(cases.EVERY)
@each_strategy
def test_what_sampling_begins_with_is_left_alone(specimen, strategy):
    assert equal(specimen.refined(strategy).start, specimen.architecture.content())


@for_each_case("replayed", cases.REPLAYS)
def test_a_step_is_replayed(replayed):
    assert replayed.report.calls[-1].action == "reused", replayed.report.notes


@for_each_case("replayed", cases.REPLAYS)
def test_a_replayed_step_runs_the_first_block_at_most(replayed):
    assert replayed.blocks.total() <= 2 * replayed.calls


@for_each_case("replayed", cases.REPLAYS)
def test_a_replayed_step_is_the_computed_step(replayed):
    assert replayed.error <= 1e-6


@for_each_case("with_addition", cases.ADDITIONS)
def test_what_is_added_beside_the_blocks_has_an_effect(with_addition):
    assert not equal(with_addition.plain, with_addition.added)


@for_each_case("with_addition", cases.ADDITIONS)
def test_what_is_added_beside_the_blocks_keeps_its_effect(with_addition):
    cached = with_addition.cached
    assert distance(cached, with_addition.added) < distance(cached, with_addition.plain)


@pytest.fixture(scope="module")
def causal_wan(comfy):
    """Drawn frame by frame: its model, and a way to sample that."""
    (architecture,) = [found for found in all_architectures() if found.name == "Causal Wan"]
    if not architecture.is_here:
        pytest.skip("this ComfyUI does not have it")
    return SimpleNamespace(
        model=frame_by_frame(architecture.build()),
        sample=lambda model: architecture.sample(model, architecture.empty_latent(), steps=4),
    )


@each_strategy
def test_a_model_that_draws_frame_by_frame_is_computed_in_full(causal_wan, cached, reports, strategy):
    plain = causal_wan.sample(causal_wan.model)
    assert torch.equal(causal_wan.sample(cached(causal_wan.model, strategy)), plain)
    assert reports.all[0].count("reused", "forecast") == 0


@each_strategy
def test_of_a_model_that_draws_frame_by_frame_the_report_says_so(causal_wan, cached, reports, strategy):
    causal_wan.sample(cached(causal_wan.model, strategy))
    assert any("frame by frame" in note for note in reports.all[0].notes)


@for_each(cases.EVERY_THIRD, "specimen_in_half_precision")
@each_off
def test_in_bfloat16_off_is_off(specimen_in_half_precision, strategy):
    sampled = specimen_in_half_precision.sampled
    assert equal(sampled(strategy, steps=3).latent, sampled(None, steps=3).latent)


@for_each(cases.EVERY_THIRD, "specimen_in_half_precision")
@each_strategy
def test_in_bfloat16_the_latent_is_finite(specimen_in_half_precision, strategy):
    assert specimen_in_half_precision.refined(strategy).is_finite


@for_each(cases.EVERY_THIRD_WITH_BLOCKS, "specimen_in_half_precision")
@each_strategy
def test_in_bfloat16_it_reuses(specimen_in_half_precision, strategy):
    assert specimen_in_half_precision.refined(strategy).report.count("reused", "forecast") > 0


@for_each(cases.EVERY_THIRD_WITH_BLOCKS, "specimen_in_half_precision")
@each_strategy
def test_in_bfloat16_reuse_saves_work(specimen_in_half_precision, strategy):
    refined = specimen_in_half_precision.refined
    assert refined(strategy).flops < refined(None).flops


def test_every_model_file_of_this_comfyui_is_in_the_zoo(comfy):
    assert model_files() - {architecture.covers for architecture in all_architectures()} - set(NO_DENOISERS) == set()


def test_the_model_files_of_this_comfyui_are_found(comfy):
    assert len(model_files()) > fewest_files()


def test_every_strategy_is_tested_here():
    assert {type(strategy) for strategy in OFF} == {type(strategy) for strategy in AGGRESSIVE} == set(all_strategies())


@pytest.mark.xdist_group("grouping")
def test_two_processes_share_no_architecture(request):
    if not hasattr(request.config, "workerinput"):
        pytest.skip("one process")
    assert request.node.nodeid.endswith("@grouping"), (
        "this pytest-xdist groups nothing: install the Makefile's versions"
    )


@pytest.fixture(scope="session")
def rows(request):
    """What is measured for docs/models.md; written at the end if that is asked for."""
    collected: list[Row] = []
    yield collected
    if request.config.getoption("--write-models"):
        MODELS.write_text(written(collected, MODELS.read_text(encoding="utf-8")), encoding="utf-8")


@for_each(cases.EVERY)
def test_docs_models_tells_what_was_found(specimen, rows):
    rows.append(row := Row(specimen.architecture, specimen.shares_left_out(AGGRESSIVE)))
    known = rows_in(MODELS.read_text(encoding="utf-8"))
    assert known.get(specimen.architecture.name) == row.facts, "run the zoo with --write-models"
