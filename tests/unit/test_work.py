"""Who answered a call: the model's blocks, or someone else in their place."""

import pytest
import torch
from toy import ReuseAlways, Sampling, Toy, first_latent

from cache_core.model.work import Work
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

WHOLE = [
    FirstBlockCache(residual_diff_threshold=0.5),
    *(TaylorSeerCache(cache_interval=2, cache_level=level) for level in ("output", "model", "block", "module")),
]
whole = pytest.mark.parametrize("strategy", WHOLE, ids=lambda each: f"{each.title}-{each.levels[0]}")
layouts = pytest.mark.parametrize("layout", ["joined", "separate"])
ANSWERED = "another node answers model calls"


def answering_from(toy, step, sampling):
    """From this step on the toy gives what it gave last to as many rows, and no block of it runs."""
    own, given = toy.forward, {}

    def forward(latent, *args):
        if sampling.run.state.evaluation.number <= step:
            given[len(latent)] = own(latent, *args)
        return given[len(latent)].clone()

    toy.forward = forward


@layouts
@whole
def test_once_someone_else_answers_nothing_is_reused_or_kept_any_more(strategy, layout):
    toy = Toy()
    sampling = Sampling(toy, (strategy,), layout=layout)
    answering_from(toy, 6, sampling)
    sampling.sample(first_latent())
    calls = sampling.report.calls
    late = [call for call in calls if call.step.index >= 8]
    assert any(call.action != "computed" for call in calls if call.step.index < 6)
    assert {call.action for call in late} == {"computed"}
    assert {call.reason for call in late} == {"another node answers model calls too"}
    assert [ANSWERED in note for note in sampling.report.notes].count(True) == 1
    assert not sampling.run.state.memories


@layouts
@whole
def test_a_model_that_answers_itself_is_not_suspected(strategy, layout):
    sampling = Sampling(Toy(), (strategy,), layout=layout)
    sampling.sample(first_latent())
    assert sampling.report.count("reused", "forecast") >= 3
    assert not [note for note in sampling.report.notes if ANSWERED in note]


def test_attention_is_reused_whoever_answers_other_calls():
    toy = Toy()
    sampling = Sampling(toy, (ReuseAlways("attention"),))
    answering_from(toy, 2, sampling)
    sampling.sample(first_latent())
    assert sampling.report.count("reused") >= 1
    assert not sampling.report.notes


def test_of_one_branch_all_is_compared_with_its_own_first_call():
    toy = Toy()
    work = Work(toy, {})
    blocks = toy.blocks
    assert set(work.watched) == set(blocks)
    assert not work.is_little(blocks, "positive")
    assert not work.is_little(blocks[:2], "without some blocks")
    assert not work.is_little(blocks[:2], "without some blocks")
    assert not work.is_little(blocks[:3], "positive")
    assert work.is_little(blocks[:1], "positive")
    assert work.is_little([], "new")


def test_a_first_call_in_which_nothing_ran_is_no_measure():
    toy = Toy()
    work = Work(toy, {})
    assert not work.is_little([], "positive")  # nothing is known yet
    assert not work.is_little(toy.blocks, "positive")
    assert work.is_little([], "positive")


def test_of_a_list_of_one_its_first_and_last_part_are_watched():
    toy = Toy(doubles=1, singles=1)
    watched = list(Work(toy, {}).watched)
    assert len(watched) == 4 and not set(toy.blocks) & set(watched)
    assert all(any(True for _ in module.parameters(recurse=False)) for module in watched)


def test_a_model_without_lists_of_blocks_is_not_watched():
    assert not Work(torch.nn.Linear(2, 2), {}).is_little([], "positive")
