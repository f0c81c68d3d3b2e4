"""What strategies take of memory at their defaults, measured by the allocator's events on a stack of video blocks.

In units of S, one hidden_states of both branches in 16 bit, and of L, the output of each self-attention once.
`python benchmarks/memory.py` prints all of it.
"""

import re
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from allocations import taken_by
from memory_shapes import GIB, MODELS, ModelShape, bytes_by_step, bytes_held_late, bytes_to_hold
from memory_taken import extra_of
from published import as_published
from video_blocks import CHANNELS, TOKENS, VOLUME, S

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

BLOCKS, STEPS = 3, 12
L = BLOCKS  # in S
LITTLE = 0.1  # S: latents, and what is kept of them, are a 32nd of it each
ATTENTION_CACHES = [(PyramidAttentionBroadcast(), 1), (as_published(), 2)]  # with the outputs a reused call needs
LEVELS = {level: TaylorSeerCache(cache_level=level) for level in ("output", "model", "block", "module")}
ALL = [FirstBlockCache(), *LEVELS.values(), *(strategy for strategy, _ in ATTENTION_CACHES), FasterCache()]
EACH = ((TOKENS,),) * BLOCKS
VIDEO = ModelShape(
    "video blocks", 2, CHANNELS, (TOKENS,), (TOKENS,), EACH, 3 * EACH, EACH, EACH, latents=((1, 1, *VOLUME),)
)
volumes = pytest.mark.parametrize("keeps_axes", [False, True], ids=["tokens", "volumes"])


def name_of(strategy):
    return f"{type(strategy).__name__}-{getattr(strategy, 'cache_level', '')}".removesuffix("-")


WITHIN = range(5, 9)  # the steps in which these may reuse something; TaylorSeer's have no beginning
IN_A_WINDOW = [
    FirstBlockCache(residual_diff_threshold=1.0, start_percent=4.5 / STEPS, end_percent=8.5 / STEPS),
    *(replace(strategy, disable_cache_after_step=WITHIN.stop) for strategy in LEVELS.values()),
]
each_strategy = pytest.mark.parametrize("strategy", ALL, ids=name_of)
attention_caches = pytest.mark.parametrize(
    ("strategy", "outputs"), [pytest.param(*case, id=name_of(case[0])) for case in ATTENTION_CACHES]
)


@cache
def extra(strategy, keeps_axes=False):
    found = extra_of(strategy, BLOCKS, STEPS, keeps_axes)
    assert any(found.is_reused())
    return found


def test_what_calls_take_is_counted_to_the_byte():
    kept = []

    def keep():
        kept.append(torch.empty(1000, dtype=torch.uint8))
        torch.empty(5000, dtype=torch.uint8)

    first, second = taken_by([keep, keep])
    assert (first.peak, first.held, first.allocated) == (6000, 1000, 6000)
    assert (second.peak, second.held, second.allocated) == (7000, 2000, 6000)


@volumes
def test_first_block_cache_holds_what_the_blocks_add_twice_and_little_of_the_first(keeps_axes):
    assert max(extra(FirstBlockCache(), keeps_axes).held) <= 2 + LITTLE


@volumes
def test_first_block_cache_takes_at_most_2_8(keeps_axes):
    assert extra(FirstBlockCache(), keeps_axes).peak <= 2.8


@pytest.mark.parametrize("strategy", [FirstBlockCache(), LEVELS["model"]], ids=name_of)
def test_learning_the_blocks_takes_at_most_3(strategy):
    assert extra(strategy).learning <= 3


@pytest.mark.parametrize("strategy", [LEVELS["block"], LEVELS["module"]], ids=name_of)
def test_where_streams_are_not_cached_learning_copies_none(strategy):
    assert extra(strategy).learning <= extra(strategy).held[0] + LITTLE


@pytest.mark.parametrize(("level", "most"), [("output", 0), ("model", 3), ("block", 2 * L + 1), ("module", 6 * L + 1)])
def test_taylorseer_takes_two_outputs_of_each_site_and_one_more(level, most):
    assert extra(LEVELS[level]).peak <= most + LITTLE


@attention_caches
def test_an_attention_cache_takes_the_outputs_it_needs(strategy, outputs):
    assert extra(strategy).peak <= outputs * L + LITTLE


@attention_caches
def test_an_attention_cache_copies_nothing_that_no_step_reuses(strategy, outputs):
    assert max(extra(strategy).copied_unused(outputs)) * L <= 0.5  # half an attention's output, of all in the call


@pytest.mark.parametrize("strategy", IN_A_WINDOW, ids=name_of)
def test_outside_a_window_nothing_is_copied_and_nothing_held(strategy):
    found = extra(strategy)
    reusing = [step for step, is_reused in enumerate(found.is_reused()) if is_reused]
    unused = list(range(WITHIN.stop, STEPS))
    if strategy.tests_first_block:
        assert reusing[0] == WITHIN.start
        unused += range(1, WITHIN.start - 2)  # two are kept; the first step also learns
    assert set(reusing) & set(WITHIN) and not set(reusing) & set(unused)
    assert max(found.held[step] for step in unused) <= LITTLE
    copied = [found.cached.steps[step].allocated - found.plain.steps[step].allocated for step in unused]
    assert max(copied) / S <= 0.25  # what is compared of the first block; a copy of anything else is 1


@each_strategy
def test_what_is_reported_is_what_is_held(strategy):
    found = extra(strategy)
    assert found.cached.report.bytes_held / S == pytest.approx(max(found.held), abs=LITTLE)


@each_strategy
def test_shapes_alone_tell_what_is_held(strategy):
    assert bytes_to_hold(strategy, VIDEO) == pytest.approx(extra(strategy).cached.report.bytes_held, rel=0.05)


def test_features_of_any_dimensions_are_thinned_alike():
    tokens = bytes_to_hold(FirstBlockCache(), VIDEO)
    for other in (replace(VIDEO, main=VOLUME), replace(VIDEO, has_rows=False)):
        assert bytes_to_hold(FirstBlockCache(), other) == pytest.approx(tokens, rel=0.05)


def test_of_wan_it_is_gigabytes_at_attention_and_two_hidden_states_along_the_blocks():
    (wan,) = [model for model in MODELS if "832 x 480" in model.name]
    assert bytes_to_hold(PyramidAttentionBroadcast(), wan) == 40 * wan.hidden_states
    assert bytes_to_hold(LEVELS["model"], wan) == 2 * wan.hidden_states


@volumes
def test_faster_cache_holds_two_outputs_of_one_prompt_once_the_other_is_skipped(keeps_axes):
    found = extra(as_published(), keeps_axes)
    calls = found.cached.report.calls
    first = next(call.evaluation for call in calls if call.branches == ("positive",)) - calls[0].evaluation
    held = found.held[first:]
    assert L - LITTLE <= max(held) <= L + LITTLE


@volumes
def test_where_no_step_lies_between_its_windows_it_never_takes_more(keeps_axes):
    found = extra_of(as_published(), BLOCKS, 10, keeps_axes)
    assert L - LITTLE <= max(found.held) <= found.peak <= L + LITTLE
    assert sum(found.is_reused()) >= 3


def test_of_wan_twice_that_is_held_only_until_the_negative_prompt_is_skipped():
    (wan,) = [model for model in MODELS if "832 x 480" in model.name]
    held = bytes_by_step(as_published(), wan)
    latents = held[0]
    outputs = [round((each - latents) / wan.hidden_states) for each in held]
    assert outputs == [0] * 5 + [40, 80, 80] + [40] * 11 + [0]  # at 650 of 1000 both prompts reuse attention


@volumes
def test_by_default_faster_cache_never_holds_attention_of_both_prompts(keeps_axes):
    found = extra(FasterCache(), keeps_axes)
    assert L - LITTLE <= max(found.held) <= found.peak <= L + LITTLE
    assert sum(found.is_reused()) >= STEPS // 2 - 1


def test_of_wan_that_is_as_much_from_the_second_step_to_the_last():
    (wan,) = [model for model in MODELS if "832 x 480" in model.name]
    outputs = [round(each / wan.hidden_states) for each in bytes_by_step(FasterCache(), wan)]
    assert outputs == [20] + [40] * 18 + [0]


@pytest.mark.parametrize(
    "strategies",
    [[LEVELS["block"], LEVELS["module"]], *([each] for each in ALL if type(each) is not TaylorSeerCache)],
    ids=lambda strategies: type(strategies[0]).__name__,
)
def test_tooltips_tell_these_bytes_of_real_models(strategies):
    """And so does README's table, as tests/unit/test_settings.py holds it to the tooltips.

    Held from the middle of the run on. By then FasterCache skips the negative prompt; before it may be twice that.
    """
    (told,) = {
        found
        for each in fields(strategies[0])
        for found in re.findall(r"Flux [^;]+H3 [\d./]+ GB", each.metadata.get("help", ""))
    }
    numbers = [one for sizes in re.findall(r"([\d./]+) GB", told) for one in sizes.split("/")]
    wanted = [bytes_held_late(strategy, model) / GIB for model in MODELS for strategy in strategies]
    rounded = [f"{size:.{len(number.partition('.')[2])}f}" for size, number in zip(wanted, numbers, strict=True)]
    assert rounded == numbers
