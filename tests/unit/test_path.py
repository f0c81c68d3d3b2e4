"""Noise that a sampler adds is seen, and nothing else is taken for it."""

from itertools import pairwise

import pytest
import torch
from torch.overrides import TorchFunctionMode
from toy import POSITIVE, TEXTS, Sampling, first_latent

from cache_core.run.path import ANOTHER, LEAST_NOISE, LatentPath
from cache_core.run.run import CacheRun
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import NOISE_IS_ADDED, TaylorSeerCache
from cache_core.strategy.step import Schedule

SIGMAS = [1 - step / 12 for step in range(12)]
SHAPE = (2, 4, 8, 8)


def draw(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def predicted(latent, sigma):
    """A prediction of the clean latent that changes with the latent and the sigma."""
    return torch.tanh((1 - sigma) * latent.roll(1, -1) + 0.3 * draw(9))


def euler(latent, sigma, following, past):
    return latent + (following - sigma) * (latent - past[0][1]) / sigma


def two_steps(latent, sigma, following, past):
    directions = [(of - clean) / at for at, clean, of in past[:2]]
    slope = directions[0] - directions[-1]
    return latent + (following - sigma) * (directions[0] + 0.5 * slope)


def ancestral(latent, sigma, following, past):
    noise = draw(int(1000 * sigma))
    return past[0][1] + following * (0.8 * (latent - past[0][1]) / sigma + 0.6 * noise)


def reach(path, latent):
    """The latent is here, and all of it is read."""
    path.reaches(latent)
    path.read(torch.cat(path.unread).tolist())


def shares(step, drawn=None, held=None):
    """The share of noise in each move of one method; where `drawn` is 0 the latent is held to a picture."""
    path, latent, past, found = LatentPath(drawn), draw(1), [], []
    for sigma, following in pairwise(SIGMAS):
        reach(path, latent)
        found.append(path.noise_share)
        past.insert(0, (sigma, predicted(latent, sigma), latent))
        path.predicted(past[0][1])
        latent = step(latent, sigma, following, past)
        if drawn is not None:
            latent = torch.where(drawn >= 1, latent, held + following * draw(2))
    return found[1:]


@pytest.mark.parametrize("step", [euler, two_steps])
def test_what_is_made_of_latents_and_predictions_is_explained(step):
    assert max(shares(step)) < 0.01


def test_noise_is_not_explained():
    assert min(shares(ancestral)) > 2 * LEAST_NOISE


def test_a_latent_that_stands_still_is_no_noise():
    path, latent = LatentPath(), draw(1)
    reach(path, latent)
    path.predicted(predicted(latent, 0.5))
    reach(path, latent * (1 + 1e-6))
    assert path.noise_share < 0.01


def test_a_sigma_next_to_zero_hides_no_direction():
    """Where inversion begins the prediction is the latent but for its last digits."""
    path, latent = LatentPath(), draw(1)
    velocity = predicted(latent, 0.5)
    reach(path, latent)
    path.predicted(latent - 1e-4 * velocity)
    reach(path, latent + 0.05 * velocity)
    assert path.noise_share < 0.02


def test_a_latent_of_another_shape_begins_its_path_anew():
    """Even one of which as many values are looked at."""
    path = LatentPath(torch.ones(SHAPE))
    for latent in (draw(1), draw(2).repeat(1, 1, 2, 2), draw(3)[:1]):
        reach(path, latent)
        assert (path.noise_share, path.novelty) == (0, 0)
        path.predicted(latent)
    reach(path, draw(4)[:1])
    assert path.noise_share > LEAST_NOISE and path.novelty > ANOTHER


@pytest.mark.parametrize("step", [euler, two_steps])
@pytest.mark.parametrize("count", [3, 6])
def test_another_picture_is_no_continuation(step, count):
    path, latents, pasts, found = LatentPath(), [draw(number) for number in range(2)], [[], []], []
    for index, (sigma, following) in enumerate(pairwise(SIGMAS)):
        which = int(index >= count)
        latent, past = latents[which], pasts[which]
        reach(path, latent)
        found.append(path.novelty > ANOTHER)
        past.insert(0, (sigma, predicted(latent, sigma), latent))
        path.predicted(past[0][1])
        latents[which] = step(latent, sigma, following, past)
    assert [index for index, is_another in enumerate(found) if is_another] == [count]


def test_two_pictures_in_turns_are_told_from_noise():
    path, latents, pasts = LatentPath(), [draw(number) for number in range(2)], [[], []]
    for sigma, following in pairwise(SIGMAS):
        for which in range(2):
            reach(path, latents[which])
            pasts[which].insert(0, (sigma, predicted(latents[which], sigma), latents[which]))
            path.predicted(pasts[which][0][1])
            latents[which] = euler(latents[which], sigma, following, pasts[which])
            if sigma < 1 - 1 / 12:
                assert path.novelty > ANOTHER and path.goes_on_from_before
    noisy, latent = LatentPath(), draw(1)
    for number in range(4):
        reach(noisy, latent)
        noisy.predicted(predicted(latent, 0.5))
        latent = draw(number + 5)
        assert not noisy.goes_on_from_before
    assert noisy.novelty > ANOTHER


def test_outside_a_mask_nothing_is_asked():
    drawn = torch.zeros(SHAPE)
    drawn[..., 4:] = 1
    assert max(shares(euler, drawn, held=draw(5))) < 0.01
    assert max(shares(ancestral, drawn, held=draw(5))) > LEAST_NOISE
    assert not max(shares(euler, torch.full(SHAPE, 0.5), held=draw(5))) > LEAST_NOISE  # NaN: nothing is known


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_of_what_is_no_number_nothing_is_said(broken):
    path = LatentPath()
    for latent in (draw(1), torch.full(SHAPE, broken), draw(2)):
        reach(path, latent)
        assert not path.noise_share > LEAST_NOISE and not path.novelty > 0 and not path.goes_on_from_before
        path.predicted(latent)


def test_the_path_keeps_its_own_copies():
    path, latent = LatentPath(), draw(1)
    path.reaches(latent)
    path.predicted(clean := predicted(latent, 1.0))
    moved = latent + 0.1 * (clean - latent)
    latent.zero_(), clean.zero_()
    reach(path, moved)
    assert path.noise_share < 0.01


def test_a_path_that_nobody_reads_holds_no_more_the_longer_it_is():
    path = LatentPath()
    for number in range(50):
        path.reaches(draw(number))
        path.predicted(draw(number))
    assert len(path.unread) <= 10


@pytest.mark.parametrize("noise", [False, True])
def test_taylorseer_continues_a_trend_only_without_noise(toy, noise):
    """And the share is read with the sigma: the device is waited for once in a call."""
    run, latent = CacheRun([TaylorSeerCache(cache_interval=3)], Schedule([*SIGMAS, 0.0])), first_latent()
    for index, sigma in enumerate(SIGMAS):
        run.begin_evaluation(latent=latent)
        forward = lambda: toy(latent, torch.tensor([sigma]), TEXTS[POSITIVE])  # noqa: B023, E731
        velocity = run.call_model(toy, forward, torch.tensor([sigma]), contexts=[POSITIVE])
        run.end_evaluation(latent - sigma * velocity)
        latent = latent - velocity / len(SIGMAS)
        latent = latent + noise * 0.3 * torch.randn(latent.shape, generator=torch.Generator().manual_seed(index))
    assert run.state.paths.whole.has_noise == noise == (NOISE_IS_ADDED in run.report.notes)
    assert run.report.count("reused") >= 6 if noise else run.report.count("forecast") >= 4
    assert run.report.count("forecast") == 0 or not noise


@pytest.mark.parametrize("strategy", [FirstBlockCache(), TaylorSeerCache()], ids=lambda strategy: strategy.title)
def test_watching_for_noise_costs_nothing_where_nobody_asks(strategy):
    """It was 115 calls of PyTorch an evaluation."""

    class Calls(TorchFunctionMode):
        count = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            Calls.count += getattr(function, "__name__", "") not in ("__get__", "__set__", "__hash__")
            return function(*args, **(kwargs or {}))

    run, latent = CacheRun([strategy], Schedule([*SIGMAS, 0.0])), first_latent()
    with Calls():
        for _ in range(4):
            run.begin_evaluation(latent=latent)
            run.end_evaluation(latent)
    assert (Calls.count > 0) == strategy.trusts_schedule


def test_a_planned_step_is_computed_once_at_one_sigma(toy):
    """As Heun's method asks: first for the predictor's latent, then for the corrected one."""
    sampling = Sampling(toy, (TaylorSeerCache(cache_interval=2),))
    for index in (0, 1, 1, 2, 2, 3, 3, 4, 4):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent() * (1 - index / 50)), index)
    actions = [call.action == "computed" for call in sampling.report.calls]
    assert actions == [True, True, False, True, False, False, False, True, False]
    assert sampling.report.calls[2].reason == "computed at this sigma already"


def test_what_a_branch_keeps_that_is_gone_is_dropped(toy):
    sampling = Sampling(toy, (TaylorSeerCache(cache_interval=3),))
    for index in range(6):
        sampling.predict(dict.fromkeys([*TEXTS][: 1 + (index < 3)], first_latent()), index)
        assert len(sampling.run.state.memories) == 2 - (index >= 4)
