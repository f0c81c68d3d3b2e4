"""Where a prompt is left out and that goes wrong: what is asked again, and that nothing half made stays."""

import pytest
import torch
from published import as_published
from toy import (
    NEGATIVE,
    PICTURE,
    POSITIVE,
    GuidedSampling,
    Sampling,
    Toy,
    first_latent,
    sigmas_of,
)

from cache_core.run.reading import AnotherStep
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

TOKENS, STEPS, FAILS = PICTURE[0] * PICTURE[1], 12, 3
LEAVING_OUT = as_published(unconditional_batch_timestep_skip_end=1001, spatial_attention_timestep_skip_end=1001)
BESIDE = {
    "alone": (),
    "First Block Cache": (FirstBlockCache(residual_diff_threshold=0.3),),
    "TaylorSeer": (TaylorSeerCache(cache_interval=2, cache_level="output", disable_cache_before_step=1),),
}
layouts = pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
LEFT_OUT = "the negative prompt runs in every step from here on"


class Watched(GuidedSampling):
    """Keeps what each evaluation was asked about and gave."""

    def __post_init__(self):
        super().__post_init__()
        self.given = []

    def predict(self, latents, index):
        self.index = index
        predicted = super().predict(latents, index)
        self.given.append((latents[POSITIVE], predicted))
        return predicted


def failing(error, how_often=1, layout="joined", beside="alone"):
    """A sampling of the toy in which block three fails, from step `FAILS` on, once a prompt is left out and it runs."""
    toy, left = Toy(), [how_often]
    sampling = Watched(toy, (*BESIDE[beside], LEAVING_OUT), sigmas_of(STEPS), layout=layout)
    own = toy.single_blocks[1].forward

    def forward(*args):
        if sampling.index >= FAILS and left[0] and (sampling.asked[-1] == (POSITIVE,) or left[0] < how_often):
            left[0], sampling.failed = left[0] - 1, sampling.index
            raise error
        return own(*args)

    toy.single_blocks[1].forward = forward
    return sampling


@layouts
@pytest.mark.parametrize("beside", BESIDE)
def test_a_call_with_one_prompt_that_fails_is_made_again_as_without_a_cache(layout, beside):
    sampling = failing(IndexError("row 1"), layout=layout, beside=beside)
    sampling.sample(first_latent(tokens=TOKENS))
    both, failed = (POSITIVE, NEGATIVE), sampling.failed
    assert failed in (3, 4)  # in step 5 both are due
    assert sampling.asked == [both, *[(POSITIVE,)] * failed, *[both] * (STEPS - failed)]
    latent, predicted = sampling.given[failed]
    exact = Sampling(Toy(), None, sigmas_of(STEPS), layout).predict(dict.fromkeys(both[::-1], latent), failed)
    assert all(torch.equal(predicted[name], exact[name]) for name in both)
    (told,) = [note for note in sampling.report.notes if note.startswith(LEFT_OUT)]
    assert "IndexError: row 1" in told
    here = [call for call in sampling.report.calls if call.step.index == failed]
    assert sorted(name for call in here for name in call.branches) == sorted(both)
    assert {call.action for call in here} == {"computed"}
    before = [call for call in sampling.report.calls if call.step.index < failed]
    later = [call for call in sampling.report.calls if call.step.index > failed]
    assert sum(call.reason.startswith("the negative prompt") for call in before) == failed - 1
    assert sum(call.action != "computed" for call in later) >= 2  # attention, or the blocks, are reused again
    assert not [call for call in later if call.reason.startswith("the negative prompt")]


@pytest.mark.parametrize(
    "error", [AnotherStep(), RuntimeError("CUDA error: an illegal memory access was encountered"), KeyboardInterrupt()]
)
def test_what_says_nothing_of_the_call_passes_at_once(error):
    sampling = failing(error)
    with pytest.raises(type(error)):
        sampling.sample(first_latent(tokens=TOKENS))
    assert sampling.asked[-1] == (POSITIVE,) and len(sampling.asked) == FAILS + 1


def test_the_second_error_is_raised():
    sampling = failing(IndexError("row 1"), how_often=2)
    with pytest.raises(IndexError) as raised:
        sampling.sample(first_latent(tokens=TOKENS))
    assert sampling.asked[-2:] == [(POSITIVE,), (POSITIVE, NEGATIVE)]
    assert raised.value.__context__ is None
    assert not [note for note in sampling.report.notes if note.startswith(LEFT_OUT)]


def test_an_error_with_both_prompts_is_raised_at_once_if_none_was_left_out():
    sampling = failing(IndexError("row 1"))
    sampling.toy.fails_in_block_three = True
    with pytest.raises(RuntimeError, match="block three"):
        sampling.sample(first_latent(tokens=TOKENS))
    assert sampling.asked == [(POSITIVE, NEGATIVE)]


@pytest.mark.parametrize("layout", ["joined", "separate"])
@pytest.mark.parametrize("answers", [2, 5], ids=["with one prompt", "with both"])
def test_who_answers_in_the_models_place_is_seen_without_another_strategy(layout, answers):
    """Computed with both in steps 0 and 5. From this one on the toy gives what it gave last to as many rows."""
    toy, given = Toy(), {}
    sampling = Watched(toy, (LEAVING_OUT,), sigmas_of(STEPS), layout=layout)
    own = toy.forward

    def forward(latent, *args):
        if sampling.index < answers:
            given[len(latent)] = own(latent, *args)
        return given[len(latent)].clone()

    toy.forward = forward
    sampling.sample(first_latent(tokens=TOKENS))
    assert [note for note in sampling.report.notes if note.startswith(LEFT_OUT) and "another node answers" in note]
    late = [asked for asked in sampling.asked if len(asked) == 1]
    assert len(late) == (2 if answers == 2 else 4)
    assert sampling.asked[-6:] == [(POSITIVE, NEGATIVE)] * 6
