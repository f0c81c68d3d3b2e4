"""The promises on what newer models do: off changes nothing, reuse happens, a replay is exact, nothing is left.

What such models keep from call to call is as full and as right as without us. The numbers in docs/models.md are what
`PYTHONPATH=. python tests/unit/test_new_structures.py` prints.
"""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from new_structures import STRUCTURES, Prefix, Referring, Sparse
from toy import (
    NEGATIVE,
    POSITIVE,
    TEXT,
    ReuseAlways,
    Sampling,
    first_latent,
    relative_error,
    tensors_in,
    traces_on,
    uncached,
)

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

MODELS = Path(__file__).parents[2] / "docs" / "models.md"
NEVER_MET, REUSES = FirstBlockCache(residual_diff_threshold=1e-9), FirstBlockCache(residual_diff_threshold=0.3)
OTHERS = [TaylorSeerCache(cache_interval=2, cache_level=level) for level in ("output", "model", "block", "module")]
WITH_STORE = ["prefix in one sequence", "prefix in turns"]
STEPS = 12

each_structure = pytest.mark.parametrize("name", STRUCTURES)
each_layout = pytest.mark.parametrize("layout", ["joined", "separate"])
each_store = pytest.mark.parametrize("name", WITH_STORE)


@cache
def plain(name, layout="joined"):
    """Sampled without a cache: the model, and what it made."""
    model = STRUCTURES[name]()
    return model, uncached(model, first_latent(), layout=layout)


@cache
def cached(name, strategy, layout="joined"):
    """Sampled with a cache."""
    sampling = Sampling(STRUCTURES[name](), (strategy,), layout=layout)
    return sampling, sampling.sample(first_latent())


@cache
def replayed(name):
    """One latent six times: each call's prediction, and the sampling."""
    sampling = Sampling(STRUCTURES[name](), (ReuseAlways(),), branches=(POSITIVE,))
    return [sampling.call_on(first_latent(), 0) for _ in range(6)], sampling


def same(some, others):
    return list(some) == list(others) and all(torch.equal(some[place], others[place]) for place in some)


@each_structure
@each_layout
def test_a_threshold_that_is_never_met_changes_nothing(name, layout):
    sampling, made = cached(name, NEVER_MET, layout)
    model, exact = plain(name, layout)
    assert torch.equal(made, exact)
    assert same(sampling.toy.kept(), model.kept())
    assert sampling.report.count("reused", "forecast") == 0


@each_structure
@each_layout
def test_the_blocks_are_read_and_calls_are_reused(name, layout):
    sampling, made = cached(name, REUSES, layout)
    model, exact = plain(name, layout)
    assert sampling.report.blocks.startswith("4 blocks")
    assert sampling.toy.runs < 0.75 * model.runs
    assert relative_error(made, exact) < 0.1


@each_structure
@pytest.mark.parametrize("strategy", OTHERS, ids=lambda strategy: strategy.cache_level)
def test_the_other_levels_reuse_too(name, strategy):
    sampling, made = cached(name, strategy)
    assert sampling.report.count("reused", "forecast") > 0
    assert relative_error(made, plain(name)[1]) < 0.1


@each_structure
@pytest.mark.parametrize("strategy", [PyramidAttentionBroadcast(), FasterCache()], ids=lambda strategy: strategy.title)
def test_caches_of_attention_and_guidance_do_no_harm(name, strategy):
    sampling, made = cached(name, strategy, "separate")
    assert relative_error(made, plain(name, "separate")[1]) < 0.1
    assert sampling.toy.kept().keys() == plain(name, "separate")[0].kept().keys()


@each_structure
def test_a_replayed_call_is_the_computed_one(name):
    outputs, sampling = replayed(name)
    assert sampling.report.calls[-1].action == "reused"
    assert relative_error(outputs[-1], outputs[0]) <= 1e-6


@each_structure
def test_nothing_is_left_on_the_model(name):
    sampling, _ = cached(name, REUSES)
    sampling.run.free()
    assert traces_on(sampling.toy) == []
    assert not list(tensors_in([memory.state for memory in sampling.run.state.memories.values()]))
    assert set(vars(sampling.toy)) == set(vars(plain(name)[0]))


@each_structure
@pytest.mark.parametrize("guard", ["mean", "worst frame"])
def test_what_a_model_keeps_is_after_the_first_evaluation_as_without_us(name, guard):
    kept = []
    for strategies in (None, (FirstBlockCache(guard=guard),)):
        sampling = Sampling(STRUCTURES[name](), strategies, layout="separate")
        sampling.predict(dict.fromkeys(sampling.branches, first_latent()), 0)
        kept.append(sampling.toy.kept())
    assert same(*kept)


@each_store
@each_layout
@pytest.mark.parametrize("strategy", [REUSES, *OTHERS[1:]], ids=lambda strategy: strategy.levels[0])
def test_a_prefix_runs_once_for_each_prompt_and_its_store_stays_right(name, layout, strategy):
    sampling, _ = cached(name, strategy, layout)
    assert sampling.toy.prefix_passes == plain(name, layout)[0].prefix_passes == (1 if layout == "joined" else 2)
    assert same(sampling.toy.kept(), plain(name, layout)[0].kept())


def sampled_with_a_drop(name, strategies, at):
    """A run in which the store is dropped before one of the steps: what it made, the model, the sampling."""
    sampling, latent = Sampling(STRUCTURES[name](), strategies, layout="separate"), first_latent()
    for index in range(STEPS):
        if index == at:
            sampling.toy.store.clear()
        predicted = sampling.predict(dict.fromkeys(sampling.branches, latent), index)
        velocity = 2 * predicted[POSITIVE] - predicted[NEGATIVE]
        latent = latent + (sampling.sigmas[index + 1] - sampling.sigmas[index]) * velocity
    return latent, sampling.toy, sampling


@each_store
@pytest.mark.parametrize("at", [2, 5, 6, 9])
@pytest.mark.parametrize("strategy", [REUSES, *OTHERS[1:]], ids=lambda strategy: strategy.levels[0])
def test_a_store_that_is_dropped_in_mid_run_is_filled_once_and_right(name, at, strategy):
    exact, model, _ = sampled_with_a_drop(name, None, at)
    made, cached_model, sampling = sampled_with_a_drop(name, (strategy,), at)
    assert cached_model.prefix_passes == model.prefix_passes == 4
    assert same(cached_model.kept(), model.kept())
    assert relative_error(made, exact) < 0.1
    reused = [call.step.index for call in sampling.report.calls if call.action != "computed"]
    assert at not in reused  # the prefix is in that call
    assert any(index > at for index in reused)


@pytest.mark.parametrize("name", WITH_STORE)
def test_prompts_with_many_entries_are_learned_after_the_first_call_of_each(name):
    texts = {f"entry {number}": torch.full((1, 6, 4), float(number)) for number in range(6)}
    sampling = Sampling(STRUCTURES[name](), (REUSES,), branches=tuple(texts), texts=texts, layout="separate")
    for index in range(STEPS):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent() * (1 - index / 50)), index)
    assert sampling.report.blocks == "4 blocks"
    assert sampling.report.count("reused", "forecast") > 2 * len(texts)
    assert sampling.toy.prefix_passes == len(texts)


@pytest.mark.parametrize("level", ["model", "block", "module"])
def test_a_prefix_as_long_as_the_picture_does_not_stand_in_for_it(level):
    model, latent = Prefix(in_turns=True), first_latent(tokens=TEXT)
    sampling = Sampling(model, (ReuseAlways(level),), branches=(POSITIVE,))
    outputs = [sampling.call_on(latent, 0) for _ in range(4)]
    assert relative_error(outputs[1], outputs[0]) <= 1e-6
    assert relative_error(outputs[3], outputs[0]) <= 1e-6
    assert sampling.report.count("reused") == 2


def test_a_list_that_runs_in_turns_in_every_call_is_given_up():
    latents = [first_latent() * (1 - index / 50) for index in range(6)]
    made = []
    for strategies in (None, (REUSES,)):
        sampling = Sampling(Prefix(in_turns=True, stores=False), strategies, branches=(POSITIVE,))
        made.append([sampling.call_on(latent, index) for index, latent in enumerate(latents)])
    assert all(map(torch.equal, *made))
    assert sampling.report.blocks == "no chain of blocks"
    assert any("once, in order" in note for note in sampling.report.notes)


def test_statistics_are_those_of_the_last_computed_call():
    sampling = Sampling(Sparse(), (ReuseAlways(),), branches=(POSITIVE,))
    sampling.call_on(first_latent(), 0)
    before = sampling.toy.kept()
    sampling.call_on(first_latent(seed=2), 1)
    assert sampling.report.calls[-1].action == "reused"
    assert same(sampling.toy.kept(), before)


def test_references_that_stand_still_dilute_the_mean_but_not_the_guards():
    measures = []
    for guard in ("mean", "worst frame"):
        sampling = Sampling(Referring(), (FirstBlockCache(guard=guard),), branches=(POSITIVE,))
        for index in range(2):
            sampling.call_on(first_latent() * (1 - index / 20), index)
        measures.append(sampling.report.calls[-1].measure)
    assert measures[1] > 1.5 * measures[0]


def test_docs_models_has_a_row_for_each():
    page = MODELS.read_text(encoding="utf-8")
    assert [name for name in STRUCTURES if f"| {name} |" not in page] == []


def rows():
    """The numbers of the promises, as docs/models.md tells them."""
    for name in STRUCTURES:
        (model, exact), (sampling, made) = plain(name), cached(name, REUSES)
        outputs, _ = replayed(name)
        is_off = torch.equal(cached(name, NEVER_MET)[1], exact)
        chains = " + ".join(f"{part}`" for part in sampling.report.blocks.replace(" ", " `").split(" `+ `"))
        numbers = f"{1 - sampling.toy.runs / model.runs:.0%}", f"{relative_error(made, exact):.1%}"
        replay = f"{relative_error(outputs[-1], outputs[0]):.0e}"
        yield "| " + " | ".join([name, chains, "the same" if is_off else "differs", *numbers, replay]) + " |"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    sys.stdout.write("\n".join(rows()) + "\n")
