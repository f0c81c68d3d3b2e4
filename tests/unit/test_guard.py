"""First Block Cache's guard: the sound and the worst frame have a vote beside the mean."""

import math
from dataclasses import replace

import pytest
import torch
from test_host_reads import CountingReads
from torch import nn
from toy import TEXT, C, FeedForward, Sampling, Toy, W, first_latent, relative_error, sigmas_of

from cache_core import CacheRun, Schedule
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategy.tensors import worst_change

FRAMES, SIDE, SOUND = 8, 3, 5
MEAN = FirstBlockCache(residual_diff_threshold=0.4, max_order=0)
GUARD = replace(MEAN, guard="worst frame")
STEPS = 9


class TwoStreams(nn.Module):
    """Picture and sound in two streams, as in LTX-2: the picture hears a little of the sound."""

    def __init__(self):
        super().__init__()
        self.picture, self.sound = FeedForward(), FeedForward()

    def forward(self, streams, vec):
        picture, sound = streams
        picture = picture + self.picture(picture + vec) + 0.001 * sound.mean(1, keepdim=True)
        return picture, sound + self.sound(sound + vec)


class Packed(nn.Module):
    """Text, sound and picture in one sequence without rows, as in MiniMax-H3; writes in place."""

    def __init__(self):
        super().__init__()
        self.all = FeedForward()

    def forward(self, x, vec):
        return x.add_(self.all(x + vec[0]))


class Film(nn.Module):
    """A picture that moves, and its sound: (rows, C, frames, height, width) and (rows, C, sound)."""

    def __init__(self, block):
        super().__init__()
        self.calls = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.embed_sound, self.embed_sigma = nn.Linear(C, W), nn.Linear(C, W), nn.Linear(1, W)
            self.text = nn.Parameter(torch.randn(TEXT, W))
            self.blocks = nn.ModuleList(block() for _ in range(4))
            self.head, self.head_sound = nn.Linear(W, C), nn.Linear(W, C)
        self.embed_sigma.requires_grad_(False).weight.mul_(0.1)  # a calm model: what moves is in the latent
        self.requires_grad_(False)

    def forward(self, latents, sigma):
        self.calls += 1
        film, sound = latents
        vec = self.embed_sigma(sigma[:, None, None])
        picture, heard = self.embed(film.flatten(2).mT), self.embed_sound(sound.mT)
        if isinstance(self.blocks[0], Packed):
            x = torch.cat((self.text, heard[0], picture[0]))
            for block in self.blocks:
                x = block(x, vec)
            heard, picture = x[None, TEXT : TEXT + SOUND], x[None, TEXT + SOUND :]
        else:
            for block in self.blocks:
                picture, heard = block((picture, heard), vec)
        return [self.head(picture).mT.unflatten(2, film.shape[2:]), self.head_sound(heard).mT]

    @property
    def runs_of_blocks(self):
        return sum(module.runs for module in self.modules() if isinstance(module, FeedForward))


def film(seed=1):
    return torch.randn(1, C, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def sound(seed=1):
    return torch.randn(1, C, SOUND, generator=torch.Generator().manual_seed(seed))


def with_last_frame(seed):
    other = film()
    other[:, :, -1] = film(seed)[:, :, -1]
    return other


SHOWN = {  # the latents of so many steps
    "still": [(film(), sound())] * STEPS,
    "sound": [(film(), sound(step)) for step in range(STEPS)],
    "a frame": [(with_last_frame(step), sound()) for step in range(STEPS)],
}


def shown(block, strategy, latents):
    """The report of a run about these latents, and its model."""
    model, sigmas = Film(block), sigmas_of(STEPS)
    run = CacheRun((strategy,), Schedule(sigmas))
    for latent, sigma in zip(latents, sigmas):
        level = torch.full((1,), sigma)
        run.begin_evaluation()
        with CountingReads() as counting:
            run.call_model(model, lambda level=level, latent=latent: model(list(latent), level), level, ["prompt"])
        assert counting.reads <= 1 or not run.report.calls[1:]
    run.report.close()
    return run.report, model


each_block = pytest.mark.parametrize("block", [TwoStreams, Packed])
each_change = pytest.mark.parametrize("what", ["sound", "a frame"])


@each_block
@each_change
def test_by_the_mean_it_reuses_although_the_sound_or_a_frame_changes(block, what):
    report, _ = shown(block, MEAN, SHOWN[what])
    assert report.count("reused") >= 6


@each_block
@each_change
def test_with_the_guard_all_of_that_is_computed(block, what):
    report, _ = shown(block, GUARD, SHOWN[what])
    assert report.count("computed") == STEPS
    assert all(call.measure > 0.4 for call in report.calls[1:])
    assert report.notes == []


@each_block
def test_where_nothing_changes_the_guard_reuses_as_often(block):
    actions = [[call.action for call in shown(block, strategy, SHOWN["still"])[0].calls] for strategy in (MEAN, GUARD)]
    assert actions[0] == actions[1]
    assert actions[0].count("reused") == STEPS - 1


@each_block
def test_what_is_looked_for_costs_three_passes_without_blocks(block):
    plain, guarded = (shown(block, strategy, SHOWN["still"])[1] for strategy in (MEAN, GUARD))
    assert guarded.calls - plain.calls == 3  # the picture changed, its first frame, the sound
    assert guarded.runs_of_blocks == plain.runs_of_blocks


def test_silence_has_no_vote():
    model_of_silence = [(film(), torch.zeros(1, C, SOUND))] * STEPS
    report, _ = shown(TwoStreams, GUARD, model_of_silence)
    assert report.count("reused") == STEPS - 1


def test_without_frames_the_mean_decides_and_the_report_says_so_once():
    runs = []
    for strategy in (FirstBlockCache(), FirstBlockCache(guard="worst frame")):
        sampling = Sampling(Toy(), (strategy,))
        runs.append((sampling.sample(first_latent()), [call.action for call in sampling.report.calls], sampling.report))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] and "computed" in runs[0][1] and set(runs[0][1]) != {"computed"}
    assert [note for note in runs[1][2].notes if "guard" in note] == [
        "guard finds no frames in this model's tokens, so means alone decide"
    ]


class Frames(Toy):
    """The toy of all tests, about a video."""

    def forward(self, latent, sigma, text, control=None):
        return super().forward(latent.flatten(2).mT, sigma, text).mT.unflatten(2, latent.shape[2:])


@pytest.mark.parametrize("rows", [1, 2])
def test_branches_decide_alike_in_every_layout(rows):
    latent = torch.cat([film(seed) for seed in range(rows)])
    strategy, runs = FirstBlockCache(guard="worst frame", residual_diff_threshold=0.3), []
    for layout in ("joined", "separate", "alternating"):
        sampling = Sampling(Frames(), (strategy,), layout=layout)
        sampled = sampling.sample(latent)
        steps = {call.step.index: call.action for call in sampling.report.calls}
        runs.append((sampled, [steps[index] for index in range(12)]))
        assert sampling.report.notes == []
    assert runs[0][1] == runs[1][1] == runs[2][1]
    assert 0 < runs[0][1].count("computed") < 12
    assert all(relative_error(sampled, runs[0][0]) < 1e-5 for sampled, _ in runs)


def test_a_guard_never_reuses_what_the_mean_would_not():
    latent, runs = film(), []
    for guard in ("mean", "worst frame"):
        sampling = Sampling(Frames(), (FirstBlockCache(guard=guard, residual_diff_threshold=0.2),))
        sampling.sample(latent)
        runs.append(sampling.report.count("computed"))
    assert runs[0] <= runs[1] < 12


@pytest.mark.parametrize(
    ("changes", "expected"),
    [((0.1, 0.0), 0.1), ((0.1, 0.3), 0.3), ((0.3, 0.1), 0.3), ((0.0, 0.3), math.nan), ((math.nan, 0.1), math.nan)],
)
def test_the_worst_change_by_hand(changes, expected):
    before = (torch.ones(2, 4, 3), torch.ones(2, 5, 3))
    now = tuple(part + change for part, change in zip(before, changes))
    assert worst_change(now, before).item() == pytest.approx(expected, nan_ok=True)
