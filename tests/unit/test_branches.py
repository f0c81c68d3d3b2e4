"""Branches of the prompt: joined in a batch, one by one, or now so and now so; never mixed up."""

import pytest
import torch
from toy import (
    IMAGE,
    NEGATIVE,
    POSITIVE,
    TEXTS,
    Attention,
    ReuseAlways,
    Sampling,
    TextBeside,
    Toy,
    W,
    differing,
    first_latent,
    relative_error,
    uncached,
)

from cache_core import CacheRun, Schedule
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

LEVELS = ["output", "model", "block", "module", "attention"]
THIRD = "third"
WITH_THIRD = {**TEXTS, THIRD: torch.full_like(TEXTS[NEGATIVE], 5.0)}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_a_branch_that_appears_in_mid_run_is_computed_with_its_neighbours(toy, level, layout):
    sampling = Sampling(toy, (ReuseAlways(level),), layout=layout, texts=WITH_THIRD)
    latents = dict.fromkeys((THIRD, NEGATIVE, POSITIVE), first_latent())
    for index in range(3):
        sampling.predict({name: latents[name] for name in (NEGATIVE, POSITIVE)}, index)
    before = toy.runs_of(level)
    output = sampling.predict(latents, 3)
    plain = Sampling(Toy(), None, layout=layout, texts=WITH_THIRD).predict(latents, 3)
    assert toy.runs_of(level) - before == len(toy.units(level)) * (3 if layout == "separate" else 1)
    assert all(torch.equal(output[name], plain[name]) for name in latents)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_a_branch_that_leaves_does_not_disturb_the_other(toy, level, layout):
    sampling = Sampling(toy, (ReuseAlways(level),), layout=layout)
    computed = [sampling.predict(differing(first_latent()), index) for index in range(2)][-1]
    alone = sampling.predict({POSITIVE: differing(first_latent())[POSITIVE]}, 2)
    assert sampling.report.calls[-1].action == "reused"
    assert relative_error(alone[POSITIVE], computed[POSITIVE]) < 0.1  # the steps are 1/12 of the schedule apart
    assert relative_error(alone[POSITIVE], computed[NEGATIVE]) > 0.5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_a_branch_that_was_away_for_an_evaluation_computes_with_all_others(toy, level, layout):
    sampling, latents = Sampling(toy, (ReuseAlways(level),), layout=layout), differing(first_latent())
    rows = []
    for index, names in enumerate([(NEGATIVE, POSITIVE)] * 2 + [(POSITIVE,)] + [(NEGATIVE, POSITIVE)] * 2):
        before = toy.rows_of(level)
        output = sampling.predict({name: latents[name] for name in names}, index)
        rows.append(toy.rows_of(level) - before)
        if index == 3:
            plain = Sampling(Toy(), None, layout=layout).predict(latents, 3)
            assert all(torch.equal(output[name], plain[name]) for name in latents)
    both = 2 * len(toy.units(level))
    assert rows == [both, rows[1], 0, both, 0]


@pytest.mark.parametrize("level", LEVELS)
def test_branches_in_another_order_keep_their_own(toy, level):
    sampling = Sampling(toy, (ReuseAlways(level),))
    latents = differing(first_latent())
    computed = [sampling.predict(latents, index) for index in range(2)][-1]
    turned = sampling.predict(dict(reversed(latents.items())), 2)
    assert sampling.report.calls[-1].action == "reused"
    assert all(relative_error(turned[name], computed[name]) < 0.1 for name in latents)


@pytest.mark.parametrize("level", LEVELS)
def test_another_shape_of_the_latent_is_computed(toy, level):
    sampling = Sampling(toy, (ReuseAlways(level),))
    for index in range(3):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent()), index)
    larger = first_latent(tokens=2 * IMAGE)
    output = sampling.predict(dict.fromkeys(sampling.branches, larger), 3)
    plain = Sampling(Toy(), None).predict(dict.fromkeys(sampling.branches, larger), 3)
    assert torch.equal(output[POSITIVE], plain[POSITIVE])


@pytest.mark.parametrize("level", LEVELS)
def test_another_shape_under_the_same_key_is_computed(toy, level):
    """The key should have said so; nobody gets a wrong picture for that."""
    run, outputs = CacheRun((ReuseAlways(level),), Schedule([4.0, 3.0, 2.0, 1.0, 0.0])), []
    for tokens in (IMAGE, IMAGE, IMAGE, 1):
        latent, sigma = first_latent(tokens=tokens), torch.ones(1)
        run.begin_evaluation()
        outputs.append(run.call_model(toy, lambda: toy(latent, sigma, TEXTS[POSITIVE]), sigma, [POSITIVE]))  # noqa: B023
    assert torch.equal(outputs[-1], Toy()(first_latent(tokens=1), torch.ones(1), TEXTS[POSITIVE]))


class Positioned(torch.nn.Module):
    """Its attention is also given positions, which are for all branches and have no rows of them."""

    shape: tuple[int, ...]

    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.attn.forward = lambda tokens, positions: Attention.forward(self.attn, tokens + positions)

    def forward(self, x, text, vec):
        return x + self.attn(x + vec, torch.linspace(-1, 1, IMAGE * W).reshape(self.shape))


@pytest.mark.parametrize("shape", [(1, IMAGE, W), (IMAGE, W)], ids=["one row", "no rows"])
@pytest.mark.parametrize("level", ["module", "attention"])
@pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
def test_what_is_given_for_all_branches_at_once_is_no_other_shape(layout, level, shape):
    block = type("Block", (Positioned,), {"shape": shape})
    toy = TextBeside(block)
    result = Sampling(toy, (ReuseAlways(level),), layout=layout).sample(first_latent())
    assert sum(block.attn.rows for block in toy.blocks) == 2 * len(toy.blocks)  # in the first step only
    joined = Sampling(TextBeside(block), (ReuseAlways(level),)).sample(first_latent())
    assert relative_error(result, joined) < 1e-5 < relative_error(result, uncached(TextBeside(block), first_latent()))


SHORT_AND_LONG = {NEGATIVE: TEXTS[NEGATIVE][:, :3], POSITIVE: TEXTS[POSITIVE]}


class Padding(Sampling):
    """Pads the shorter text when branches are joined, as ComfyUI does by repeating it."""

    def call(self, latents, sigma, names):
        texts, longest = self.texts, max(self.texts[name].shape[1] for name in names)
        self.texts = {name: texts[name].repeat(1, longest // texts[name].shape[1], 1) for name in names}
        try:
            return super().call(latents, sigma, names)
        finally:
            self.texts = texts


@pytest.mark.parametrize(
    "strategy",
    [*map(ReuseAlways, LEVELS), FirstBlockCache(residual_diff_threshold=1.0)],
    ids=[*LEVELS, "first-block-cache"],
)
def test_texts_of_other_lengths_when_joined_are_no_trouble(toy, strategy):
    sampling = Padding(toy, (strategy,), layout="alternating", texts=SHORT_AND_LONG)
    plain = Padding(Toy(), None, layout="alternating", texts=SHORT_AND_LONG)
    result = sampling.sample(first_latent())
    assert relative_error(result, plain.sample(first_latent())) < 0.3  # ten of twelve steps are reused


@pytest.mark.parametrize("level", LEVELS)
def test_a_second_look_of_one_branch_in_an_evaluation_has_its_own_memory(toy, level):
    sampling = Sampling(toy, (ReuseAlways(level),))
    first, second = differing(first_latent()).values()
    for index in range(3):
        sampling.run.begin_evaluation()
        answers = [
            sampling.call({POSITIVE: latent}, sampling.sigmas[index], (POSITIVE,))[POSITIVE]
            for latent in (first, second)
        ]
    plain = [Sampling(Toy(), None).call_on(latent, 2) for latent in (first, second)]
    assert sampling.report.calls[-1].action == "reused"
    assert all(relative_error(answer, exact) < 0.1 for answer, exact in zip(answers, plain, strict=True))


@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_all_branches_take_the_decision_of_the_first(toy, layout):
    strategy = FirstBlockCache(residual_diff_threshold=0.1)
    sampling = Sampling(toy, (strategy,), layout=layout)
    for index in range(10):
        calm, wild = first_latent(), first_latent() * (1 + 10 * (index % 2))
        sampling.predict({NEGATIVE: calm * (1 + 0.01 * index), POSITIVE: wild}, index)
    by_step = [{call.action for call in sampling.report.calls if call.step.index == index} for index in range(10)]
    assert all(len(actions) == 1 for actions in by_step)
    assert sampling.report.count("reused", "forecast") > 0


def test_taylorseer_plans_alike_for_all_branches(toy):
    sampling = Sampling(toy, (TaylorSeerCache(cache_level="model"),), layout="separate")
    sampling.sample(first_latent())
    actions = {name: [c.action for c in sampling.report.calls if c.branches == (name,)] for name in sampling.branches}
    assert actions[NEGATIVE] == actions[POSITIVE]
