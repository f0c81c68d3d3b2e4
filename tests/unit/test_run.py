"""CacheRun: one sampling run, whatever happens in it, and nothing of it afterwards."""

import weakref

import pytest
import torch
from toy import (
    NEGATIVE,
    POSITIVE,
    EverySecondStep,
    ReuseAlways,
    Sampling,
    Toy,
    alive,
    first_latent,
    reference,
    relative_error,
    sigmas_of,
    tensors_in,
    traces_on,
    uncached,
)

from cache_core import CacheRun, Schedule
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

LEVELS = ["output", "model", "block", "module"]


def in_mid_run(toy, *strategies, steps=4, **settings):
    """A sampling that has gone a few steps."""
    sampling = Sampling(toy, strategies, **settings)
    for index in range(steps):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent()), index)
    return sampling


def references_to_what_is_kept(sampling):
    return [weakref.ref(tensor) for tensor in tensors_in(list(sampling.run.state.memories.values()))]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("failing_evaluation", [0, 1, 2])
def test_an_exception_in_a_block_leaves_no_trace_on_the_model(toy, level, failing_evaluation):
    strategy = TaylorSeerCache(cache_level=level, disable_cache_before_step=3)
    before = [dict(vars(module)) for module in toy.modules()]
    sampling = in_mid_run(toy, strategy, steps=failing_evaluation)
    toy.fails_in_block_three = True
    with pytest.raises(RuntimeError, match="block three"):
        sampling.call_on(first_latent(), failing_evaluation)
    toy.fails_in_block_three = False
    assert [vars(module).keys() for module in toy.modules()] == [known.keys() for known in before]
    assert torch.equal(uncached(toy, first_latent()), reference())


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_goes_on_after_a_call_that_failed(toy, level):
    sampling = in_mid_run(toy, ReuseAlways(level), steps=0)
    toy.fails_in_block_three = True
    with pytest.raises(RuntimeError, match="block three"):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent()), 1)
    toy.fails_in_block_three = False
    again = [sampling.predict(dict.fromkeys(sampling.branches, first_latent()), index)[POSITIVE] for index in (1, 2)]
    assert torch.equal(
        again[0], Sampling(Toy(), None).predict(dict.fromkeys(sampling.branches, first_latent()), 1)[POSITIVE]
    )
    assert relative_error(again[1], again[0]) < 0.1  # one step further on


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, GeneratorExit, StopIteration])
def test_any_interruption_leaves_no_trace(toy, interruption):
    sampling = in_mid_run(toy, FirstBlockCache())

    def interrupt(*_):
        raise interruption

    handle = toy.double_blocks[0].attn.register_forward_pre_hook(interrupt)
    with pytest.raises(interruption):
        sampling.call_on(first_latent(), 4)
    handle.remove()
    assert traces_on(toy) == []


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_what_a_run_kept_dies_with_it(toy, level, layout):
    sampling = in_mid_run(toy, TaylorSeerCache(cache_level=level), layout=layout)
    kept = references_to_what_is_kept(sampling)
    assert kept
    del sampling
    assert alive(kept) == 0


@pytest.mark.parametrize("level", LEVELS)
def test_free_drops_what_a_run_kept_and_leaves_the_report(toy, level):
    sampling = in_mid_run(toy, TaylorSeerCache(cache_level=level))
    kept = references_to_what_is_kept(sampling)
    sampling.run.report.close()
    sampling.run.free()
    assert alive(kept) == 0
    assert len(sampling.run.report.calls) == 4


@pytest.mark.parametrize("level", LEVELS)
def test_free_drops_what_a_run_kept_even_before_its_report_is_closed(toy, level):
    sampling = in_mid_run(toy, TaylorSeerCache(cache_level=level))
    kept = references_to_what_is_kept(sampling)
    sampling.run.free()
    assert alive(kept) == 0


def test_a_failed_run_dies_with_its_exception(toy):
    sampling = in_mid_run(toy, FirstBlockCache())
    kept, toy.fails_in_block_three = references_to_what_is_kept(sampling), True
    with pytest.raises(RuntimeError, match="block three"):
        sampling.call_on(first_latent() * 9, 4)
    del sampling
    assert alive(kept) == 0


def test_old_outputs_are_dropped_during_the_run(toy):
    sampling = in_mid_run(toy, TaylorSeerCache(cache_level="model", max_order=0, disable_cache_before_step=12))
    tensors = list(tensors_in(list(sampling.run.state.memories.values())))
    assert len(tensors) == 2 * 3  # two branches, three streams, one output each


def test_without_a_strategy_for_guidance_both_predictions_are_asked_for_at_once(toy):
    run, asked = CacheRun((ReuseAlways(),), Schedule(sigmas_of(4))), []
    for sigma in sigmas_of(4)[:-1]:
        run.begin_evaluation()
        answer = run.call_guidance(toy, lambda *wanted: asked.append(wanted) or wanted, torch.tensor([sigma]), NEGATIVE)
        assert answer == (True, True)
    assert asked == [(True, True)] * 4
    assert not run.state.terms.steps_in_at("guidance")


def test_the_report_knows_the_bytes_held(toy):
    sampling = in_mid_run(toy, TaylorSeerCache(cache_level="output", max_order=1))
    assert sampling.report.bytes_held == 2 * 2 * first_latent().nbytes  # two branches, two outputs each


def test_an_empty_list_of_strategies_is_the_model_itself(toy):
    assert torch.equal(Sampling(toy, ()).sample(first_latent()), reference())


def test_two_runs_on_one_model_do_not_meet(toy):
    first, second = Sampling(toy, (FirstBlockCache(),)), Sampling(toy, (TaylorSeerCache(),))
    latents = [dict.fromkeys(first.branches, first_latent(seed=seed)) for seed in (1, 2)]
    together = [(first.predict(latents[0], index), second.predict(latents[1], index)) for index in range(8)]
    for number, strategy in enumerate((FirstBlockCache(), TaylorSeerCache())):
        alone = Sampling(Toy(), (strategy,))
        outputs = [alone.predict(latents[number], index)[POSITIVE] for index in range(8)]
        assert all(torch.equal(pair[number][POSITIVE], output) for pair, output in zip(together, outputs, strict=True))


def test_another_model_in_mid_run_is_learned_and_kept_apart(toy):
    sampling, other = in_mid_run(toy, ReuseAlways()), Toy(seed=7)
    sampling.toy = other
    latents = dict.fromkeys(("other negative", "other positive"), first_latent())
    sampling.texts = dict(zip(latents, sampling.texts.values(), strict=True))
    outputs = [sampling.predict(latents, index) for index in (4, 5, 6)]
    plain = Sampling(Toy(seed=7), None, texts=sampling.texts).predict(latents, 4)
    assert [call.action for call in sampling.report.calls[-3:]] == ["computed", "reused", "reused"]
    assert all(torch.equal(outputs[0][name], plain[name]) for name in latents)


def test_strategies_of_two_levels_work_together(toy):
    strategies = (FirstBlockCache(), TaylorSeerCache(cache_level="module"))
    sampling = Sampling(toy, strategies)
    result = sampling.sample(first_latent())
    assert relative_error(result, reference()) < 0.05
    assert toy.runs_of("block") < 12 * 5
    assert toy.runs_of("module") < toy.double_blocks[0].runs * 14


def test_an_outer_strategy_does_not_keep_the_output_of_a_call_that_is_computed_again():
    class LeavesOutItsLastBlock(Toy):
        leaves_out = False

        @property
        def single_blocks(self):
            return list(super().__getattr__("single_blocks"))[: 2 if self.leaves_out else 3]

    toy = LeavesOutItsLastBlock()
    toy.embed_sigma.weight.zero_()  # all steps are alike
    sampling = in_mid_run(toy, ReuseAlways(), EverySecondStep(), steps=2)
    toy.leaves_out = True
    computed_again = sampling.call_on(first_latent(), 2)
    kept = sampling.call_on(first_latent(), 3)
    assert torch.equal(kept, computed_again)


def test_a_first_block_cache_does_not_count_a_hit_that_was_computed_again(toy):
    sampling = in_mid_run(toy, FirstBlockCache(residual_diff_threshold=1.0, max_consecutive_cache_hits=3), steps=2)
    handle = toy.single_blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("cancelled")))
    with pytest.raises(RuntimeError, match="cancelled"):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent() * 1.01), 2)
    handle.remove()
    for index in (2, 3, 4):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent() * (1 + index / 100)), index)
    assert [call.action for call in sampling.report.calls[-3:]].count("computed") <= 1


@pytest.mark.parametrize("level", LEVELS)
def test_two_evaluations_in_a_step_as_heun_makes_them_are_followed(toy, level):
    sampling, plain = Sampling(toy, (TaylorSeerCache(cache_level=level, cache_interval=2),)), Sampling(Toy(), None)
    latents = dict.fromkeys(sampling.branches, first_latent())
    for sigma in [sigma for pair in zip(sampling.sigmas, sampling.sigmas[1:-1]) for sigma in pair]:
        sampling.run.begin_evaluation()
        output, exact = (one.call(latents, sigma, one.branches)[POSITIVE] for one in (sampling, plain))
        assert relative_error(output, exact) < 0.1
    assert sampling.report.count("forecast", "reused") > 5


def test_an_evaluation_that_another_node_answered_takes_nothing_from_the_branches(toy):
    sampling = in_mid_run(toy, EverySecondStep())
    sampling.run.begin_evaluation()  # and no model call
    sampling.predict(dict.fromkeys(sampling.branches, first_latent()), 5)
    assert sampling.report.calls[-1].action == "reused"


@pytest.mark.parametrize("branches", [[NEGATIVE], [NEGATIVE, POSITIVE]])
def test_without_begin_evaluation_one_begins_with_each_sigma_and_each_branch_that_comes_again(toy, branches):
    run, text = CacheRun((ReuseAlways("output"),), Schedule(sigmas_of(4))), torch.zeros(1, 6, 4)
    for value in (1.0, 0.75, 0.75, 0.5):
        for branch in branches:
            sigma = torch.full((1,), value)
            run.call_model(toy, lambda: toy(first_latent(), sigma, text), sigma, contexts=[branch])  # noqa: B023
    assert toy.runs == len(branches)
    assert [call.evaluation for call in run.report.calls] == sorted(len(branches) * [1, 2, 3, 4])


def test_without_begin_evaluation_no_more_is_held_the_longer_it_goes_on(toy):
    run, held, text = CacheRun((EverySecondStep(),), Schedule(sigmas_of(20))), [], torch.zeros(1, 6, 4)
    for sigma in map(torch.tensor, sigmas_of(20)[:-1]):
        for branch in (NEGATIVE, POSITIVE):
            run.call_model(toy, lambda: toy(first_latent(), sigma[None], text), sigma, contexts=[branch])  # noqa: B023
        held.append(run.state.memories.bytes_held)
    assert held[0] > 0 and set(held) == {held[0]}


def test_inference_mode_is_no_trouble(toy):
    sampling = Sampling(toy, (FirstBlockCache(),))
    with torch.inference_mode():
        result = sampling.sample(first_latent())
    assert sampling.report.count("forecast", "reused") > 0
    assert relative_error(result, reference()) < 0.05
