"""What is kept of attention for a negative prompt that is left out of steps: only what a step that follows may reuse.

Each case is also sampled as if nobody knew when that prompt runs: then everything is kept, and little of it is used.
"""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from published import as_published
from toy import (
    IMAGE,
    NEGATIVE,
    PICTURE,
    POSITIVE,
    TEXT,
    C,
    GuidedSampling,
    Sampling,
    Toy,
    W,
    first_latent,
    sigmas_of,
    tensors_in,
)

from cache_core.run.run import CacheRun
from cache_core.strategies import faster_cache
from cache_core.strategy import COMPUTE, COMPUTE_ONLY, FIRST_BLOCK, Schedule, Strategy
from cache_core.strategy.forecast import History
from cache_core.strategy.step import OpenSchedule
from cache_core.strategy.windows import last_beside

TOKENS, ATTENTIONS = PICTURE[0] * PICTURE[1], 5
OUTPUTS = ATTENTIONS * (TEXT + TOKENS) * W * 4  # bytes of one output of each attention, for one prompt
LATENTS = 2 * TOKENS * C * 4  # of what is kept of the guidance
ALWAYS = dict(unconditional_batch_timestep_skip_end=1001, spatial_attention_timestep_skip_end=1001)
layouts = pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])

CASES = {  # settings, sigmas, the last step that reuses attention for both prompts, or -1
    "one step between the windows": ({}, sigmas_of(12), 4),
    "no step between the windows": ({}, sigmas_of(10), -1),
    "both windows from the first step on": (ALWAYS, sigmas_of(12), -1),
    "from another picture, halfway": ({}, sigmas_of(20)[10:], -1),
    "steps after the negative prompt's window": (dict(unconditional_batch_timestep_skip_start=300), sigmas_of(20), 19),
    "strides too long for one of the rules": (
        dict(ALWAYS, unconditional_batch_skip_range=2, spatial_attention_block_skip_range=3),
        sigmas_of(12, shift=6.0), 11,
    ),
}  # fmt: skip
cases = pytest.mark.parametrize(("settings", "sigmas", "last"), CASES.values(), ids=CASES)


class Watched(GuidedSampling):
    """Notes for each step what attention computed, and how many of its outputs are kept for the negative prompt."""

    def __post_init__(self):
        super().__post_init__()
        self.rows, self.kept = [], []

    def predict(self, latents, index):
        before = self.toy.rows_of("attention")
        predictions = super().predict(latents, index)
        self.rows.append(self.toy.rows_of("attention") - before)
        self.kept.append(len(list(tensors_in(self.states_of(NEGATIVE)))))
        return predictions

    def states_of(self, name):
        memories = self.run.state.memories.items()
        return [each.state for ((key, _), _, site), each in memories if site.level == "attention" and key[0] == name]


def sampled(settings, sigmas, pictures=1, kind=Watched, **more):
    sampling = kind(Toy(), (as_published(**settings),), sigmas, **more)
    return sampling, sampling.sample(first_latent(rows=pictures, tokens=TOKENS))


def as_if_nobody_knew(monkeypatch):
    monkeypatch.setattr(faster_cache, "last_beside", lambda *_: None)


def totals(sampling):
    return sampling.report.as_dict()["totals"]["branches"]


@cases
@layouts
@pytest.mark.parametrize("pictures", [1, 3])
def test_the_same_is_reused_and_the_picture_is_bit_for_bit_the_same(
    monkeypatch, settings, sigmas, last, layout, pictures
):
    sampling, latent = sampled(settings, sigmas, pictures, layout=layout)
    as_if_nobody_knew(monkeypatch)
    keeping, expected = sampled(settings, sigmas, pictures, layout=layout)
    assert torch.equal(latent, expected)
    assert sampling.rows == keeping.rows and 0 in sampling.rows
    assert totals(sampling) == totals(keeping)
    assert any(kept for kept in keeping.kept)


@cases
@layouts
def test_nothing_is_kept_for_the_negative_prompt_that_no_step_reuses(settings, sigmas, last, layout):
    sampling, _ = sampled(settings, sigmas, layout=layout)
    assert any(sampling.kept) == (last >= 0)
    assert not any(sampling.kept[last + 1 :])
    held = OUTPUTS * 2 * (2 if last >= 0 else 1) + LATENTS
    assert sampling.report.bytes_held == sampling.report.bytes_foretold == held


@layouts
def test_where_no_step_lies_between_the_windows_it_is_half(monkeypatch, layout):
    half, _ = sampled({}, sigmas_of(10), layout=layout)
    as_if_nobody_knew(monkeypatch)
    whole, _ = sampled({}, sigmas_of(10), layout=layout)
    assert half.report.bytes_held - LATENTS == (whole.report.bytes_held - LATENTS) / 2


@layouts
def test_a_negative_prompt_that_always_runs_reuses_its_attention(layout):
    settings = dict(unconditional_batch_skip_range=1)
    sampling, _ = sampled(settings, sigmas_of(12), layout=layout)
    assert sampling.rows == [10] * 4 + [0, 10] * 4
    assert max(sampling.kept) == 2 * ATTENTIONS
    assert sampling.report.bytes_held == 2 * 2 * OUTPUTS


class Unguided(Watched):
    """Both prompts in every step, without a word of guidance: as beside NAG."""

    def predict(self, latents, index):
        before = self.toy.rows_of("attention")
        predictions = Sampling.predict(self, latents, index)
        self.rows.append(self.toy.rows_of("attention") - before)
        return predictions


class NoPictures(Watched):
    """The latent is no picture, and neither is what the model gives."""

    def predict(self, latents, index):
        self.run.call_guidance = partial(CacheRun.call_guidance, self.run, latent=latents[POSITIVE])
        return super().predict(latents, index)

    def picture_of(self, tokens):
        return tokens

    tokens_of = picture_of


class Answered(Watched):
    """Another node's cache is seen in the third step: from then on both prompts are asked for."""

    def predict(self, latents, index):
        if index == 2:
            self.run.state.someone_else_answered()
        return super().predict(latents, index)


@layouts
@pytest.mark.parametrize("kind", [Unguided, NoPictures])
@pytest.mark.parametrize(("settings", "rows"), [({}, [10] * 4 + [0, 10] * 4), (ALWAYS, [10, 0] * 6)])
def test_where_the_negative_prompt_is_not_estimated_its_attention_is_reused(monkeypatch, layout, kind, settings, rows):
    sampling, latent = sampled(settings, sigmas_of(12), kind=kind, layout=layout)
    as_if_nobody_knew(monkeypatch)
    keeping, expected = sampled(settings, sigmas_of(12), kind=kind, layout=layout)
    assert torch.equal(latent, expected) and sampling.rows == keeping.rows
    assert sampling.rows == rows
    assert sampling.report.bytes_held == keeping.report.bytes_held > 0


@layouts
@pytest.mark.parametrize(("settings", "rows"), [({}, [10] * 4 + [0, 10] * 4), (ALWAYS, [10, 0] * 6)])
def test_once_another_node_answers_the_negative_prompt_runs_and_reuses_its_attention(layout, settings, rows):
    sampling, _ = sampled(settings, sigmas_of(12), kind=Answered, layout=layout)
    assert sampling.rows == rows
    assert max(sampling.kept) == 2 * ATTENTIONS


@layouts
def test_twice_as_many_attentions_fit_where_the_negative_prompt_keeps_none(monkeypatch, layout):
    def fitting():
        """How many attentions were ever left out, with room for two outputs of four, for one prompt."""
        sampling = Watched(Toy(), (as_published(),), sigmas_of(10), layout=layout)
        free = 4 * 2 * OUTPUTS / ATTENTIONS + LATENTS
        sampling.run = CacheRun(sampling.strategies, Schedule(sampling.sigmas), free=lambda device: free)
        sampling.sample(first_latent(tokens=TOKENS))
        return sum(unit.rows < sampling.toy.rows for unit in sampling.toy.units("attention"))

    assert fitting() == 4
    as_if_nobody_knew(monkeypatch)
    assert fitting() == 2


def test_on_a_schedule_that_nobody_knows_everything_is_kept():
    strategy, rules = (
        as_published(),
        (("spatial_attention_timestep_skip", 2), ("unconditional_batch_timestep_skip", 5)),
    )
    assert last_beside(strategy, *rules, OpenSchedule()) is None
    sampling = Watched(Toy(), (strategy,), sigmas_of(10))
    sampling.run = CacheRun(sampling.strategies, OpenSchedule())
    sampling.sample(first_latent(tokens=TOKENS))
    assert 0 in sampling.rows and max(sampling.kept) == 2 * ATTENTIONS


@dataclass(frozen=True)
class FirstKeepsNothing(Strategy):
    """The branch whose state was made first keeps nothing, the other its last output, which it never reuses."""

    title = "First Keeps Nothing"
    levels = ("attention",)
    made: list = field(default_factory=list, hash=False, compare=False)

    def new_state(self, site):
        self.made.append(site)
        return History(capacity=1 if self.made.count(site) > 1 else 0)

    def around(self, call, state):
        if not state.capacity:
            yield COMPUTE_ONLY
        else:
            state.add(call.step.time, (yield COMPUTE))


@layouts
def test_branches_of_a_call_may_keep_their_shares_or_not(toy, layout):
    sampling = Sampling(toy, (FirstKeepsNothing(),), layout=layout)
    latent = sampling.sample(first_latent())
    assert torch.equal(latent, Sampling(Toy(), None, layout=layout).sample(first_latent()))
    memories = [(key[0][0][0], memory) for key, memory in sampling.run.state.memories.items()]
    assert {name: [len(each.state) for other, each in memories if other == name] for name in sampling.branches} == {
        NEGATIVE: [0] * 5,
        POSITIVE: [1] * 5,
    }
    assert all(memory.layout for _, memory in memories)  # else all would have to compute
    assert sampling.run.state.evaluation.must_compute == set()
    assert sampling.report.bytes_held == 5 * (TEXT + IMAGE) * W * 4


def test_a_part_is_asked_for_by_all_branches_or_by_none(toy):
    class Disagreeing(FirstKeepsNothing):
        levels = ("model",)

        def around(self, call, state):
            yield COMPUTE if state.capacity else FIRST_BLOCK
            yield COMPUTE

    with pytest.raises(RuntimeError, match="must ask for the same part in all branches"):
        Sampling(toy, (Disagreeing(),)).sample(first_latent())
