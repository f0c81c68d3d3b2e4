"""The procedural pictures of one object or two, their prompts, and the yardstick that reads off what they show."""

import random

import pytest
import torch

from cache_core.demo import codec, still_life, words
from cache_core.demo.still_life import StillLife, Thing
from training import picture_yardstick as yardstick


def rendered(told):
    return still_life.render(told, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def told():
    chance = random.Random(0)
    return [still_life.random_still_life(chance) for _ in range(64)]


@pytest.fixture(scope="module")
def pictures(told):
    return codec.decode(codec.encode(rendered(told)))


def test_the_model_hears_every_word_that_matters():
    chance = random.Random(0)
    told = {still_life.random_still_life(chance) for _ in range(2000)}
    assert len({tuple(words.heard(still_life.prompt_of(one))) for one in told}) == len(told)
    assert all(words.heard(still_life.prompt_of(one))[-1] == one.pattern for one in told)  # the last word


def test_one_thing_or_two_of_other_colours_at_other_places(told):
    assert {len(one.things) for one in told} == {1, 2}
    for one in told:
        assert len({one.background, *(thing.color for thing in one.things)}) == 1 + len(one.things)
        assert len({thing.place for thing in one.things}) == len(one.things)


def test_the_prompt_of_two_things_names_both():
    things = Thing("", "", "red", "ball", "left"), Thing("", "", "green", "cube", "top")
    prompt = still_life.prompt_of(StillLife(things, "blue", "tiled"))
    assert prompt == "a red ball at the left and a green cube at the top on a blue tiled background"
    assert words.heard(prompt) == ["red", "ball", "left", "green", "cube", "top", "blue", "tiled"]


def test_rendering_is_reproducible(told):
    pictures = rendered(told[:4])
    assert pictures.shape == (4, 3, 128, 128) and 0 <= pictures.min() < pictures.max() <= 1
    assert torch.equal(pictures, rendered(told[:4]))


@pytest.mark.parametrize("finish", ["banded", "spotted"])
def test_a_finish_darkens_a_part_of_the_thing_alone(finish):
    plain, finished = (
        rendered([StillLife((Thing("big", each, "red", "ball", "center"),), "blue", "plain")])[0]
        for each in ("", finish)
    )
    changed = (plain - finished).abs().amax(0) > 0.05
    assert 0.15 < changed[40:88, 40:88].float().mean() < 0.85
    assert not changed[:30].any() and (finished <= plain + 1e-6).all()


def test_the_yardstick_sees_what_was_drawn(told, pictures):
    shares = yardstick.share_right(pictures, told)
    assert min(shares[part] for part in ("color", "place", "background")) > 0.97
    assert shares["shape"] > 0.93 and shares["all"] > 0.85


def test_a_word_that_is_not_what_was_drawn_is_seen_to_be_wrong(told, pictures):
    turned = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "center": "left"}
    wrong = [
        one._replace(things=tuple(thing._replace(place=turned[thing.place]) for thing in one.things)) for one in told
    ]
    shares = yardstick.share_right(pictures, wrong)
    assert shares["all"] == 0 and shares["place"] < 0.5 and shares["background"] > 0.97
