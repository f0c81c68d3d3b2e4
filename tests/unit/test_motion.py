"""The procedural videos, their prompts, and the yardstick that reads off a video what it shows."""

import random

import pytest
import torch

from cache_core.demo import motion, wan, words
from training import yardstick


def rendered(clips, frames=15, size=96, every=1):
    return motion.render(clips, frames, size, torch.Generator().manual_seed(0), every)


@pytest.fixture(scope="module")
def clips():
    generator = random.Random(0)
    return [motion.random_clip(generator) for _ in range(24)]


@pytest.fixture(scope="module")
def videos(clips):
    return wan.decode(wan.encode(rendered(clips)))


@pytest.fixture(scope="module")
def found(videos):
    return list(map(yardstick.seen, videos))


def test_the_model_hears_every_word_that_matters():
    generator = random.Random(0)
    clips = {motion.random_clip(generator) for _ in range(500)}
    heard = {tuple(words.heard(motion.prompt_of(clip))) for clip in clips}
    assert len(heard) == len(clips)
    assert all(clip.pattern in words.heard(motion.prompt_of(clip)) for clip in clips)  # the last one


def test_more_frames_show_more_of_the_same_motion(clips):
    longer, shorter = rendered(clips[:4]), rendered(clips[:4], frames=5)
    torch.testing.assert_close(longer[:, 5:10], shorter)
    assert not torch.allclose(longer[:, 0], shorter[:, 0])


def test_the_yardstick_sees_what_was_drawn(clips, videos):
    assert min(yardstick.share_right(videos, clips).values()) > 0.95


def test_the_yardstick_sees_through_noise(clips, videos):
    noise = 0.05 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    assert min(yardstick.share_right((videos + noise).clamp(0, 1), clips).values()) > 0.9


def test_a_word_that_is_not_what_was_drawn_is_seen_to_be_wrong(clips, videos):
    others = {
        "color": motion.COLORS, "shape": motion.SHAPES, "place": list(motion.PLACES), "motion": list(motion.MOTIONS),
        "speed": list(motion.SPEEDS), "background": motion.COLORS,
    }  # fmt: skip
    for part, known in others.items():
        told = [clip._replace(**{part: known[known.index(getattr(clip, part)) - 1]}) for clip in clips]
        shares = yardstick.share_right(videos, told)
        assert shares[part] < 0.05 and shares["all"] < 0.05
        assert min(share for other, share in shares.items() if other not in (part, "all")) > 0.95


def test_every_third_frame_shows_the_same_motion_in_fewer_frames(clips, videos):
    torch.testing.assert_close(rendered(clips, 5, every=3), rendered(clips)[:, 1::3])
    assert yardstick.share_right(videos[:, 1::3], clips, every=3)["all"] == 1
    assert yardstick.share_right(videos[:, 1::3], clips)["speed"] < 0.8


def test_backwards_everything_moves_the_other_way(videos, found):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "growing": "shrinking"}
    opposite["shrinking"] = "growing"
    for video, forwards in zip(videos, found):
        backwards = " ".join(opposite.get(word, word) for word in forwards.motion.split())
        assert yardstick.seen(video.flip(0)) == forwards._replace(motion=backwards)


def test_in_a_still_nothing_moves(videos, found):
    for video, moving in zip(videos, found):
        seen = yardstick.seen(video[7:8].expand(15, -1, -1, -1))
        assert (seen.motion, seen.speed) == ("", "")
        assert (seen.color, seen.place, seen.background) == (moving.color, moving.place, moving.background)


def test_in_noise_and_in_an_empty_picture_nothing_is_right(clips):
    noise = torch.rand(24, 5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert yardstick.share_right(noise, clips)["all"] == 0
    assert yardstick.seen(torch.full((5, 3, 64, 64), 0.5)) == yardstick.Seen(background="white")
    assert yardstick.seen(torch.full((5, 3, 64, 64), torch.nan)).color == ""  # of a training that went wrong


def test_an_object_that_is_not_there_all_the_time_is_not_seen(videos):
    video = videos[0].clone()
    video[4:6] = video[0, :, :1, :1]  # the background of a corner
    assert yardstick.seen(video).color == ""
