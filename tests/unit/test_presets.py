"""The presets: what is chosen for a family and a number of steps, and that the words about it are true."""

import json
import re
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from cache_core import Schedule
from cache_core.compare.side_by_side import described
from cache_core.presets import (
    DEMO,
    OTHER,
    PRESETS,
    QUALITIES,
    TOO_FEW_STEPS,
    UNET,
    UNPUBLISHED,
    VIDEO_DEMO,
    choose,
)
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

DOCS = Path(__file__).parents[2] / "docs"
ALL = [(family, quality) for family in PRESETS for quality in QUALITIES]
every_preset = pytest.mark.parametrize(("family", "quality"), ALL)


def boldness(strategy):
    """Larger for settings that reuse more; of one kind of strategy."""
    if isinstance(strategy, FirstBlockCache):
        return strategy.residual_diff_threshold
    return -len(strategy.computed_steps(Schedule([1 - step / 20 for step in range(21)])))


@every_preset
def test_a_preset_is_on_and_says_on_whose_word_it_is(family, quality):
    choice = choose(family, quality, steps=20)
    preset = PRESETS[family][quality]

    assert not choice.strategy.is_off
    assert choice.strategy == preset.strategy
    assert choice.strategy.title in choice.words
    assert preset.words in choice.words
    assert ("not measured" in choice.words) == (preset.evidence != "measured")
    assert ("Published by" in choice.words) == (preset.evidence == "published")
    assert ("cautious" in choice.words) == (preset.evidence == "cautious")


def test_only_the_demos_are_called_measured():
    assert {family for family, quality in ALL if PRESETS[family][quality].evidence == "measured"} == {DEMO, VIDEO_DEMO}


@pytest.mark.parametrize("family", PRESETS)
def test_each_quality_is_bolder_than_the_one_before(family):
    strategies = [PRESETS[family][quality].strategy for quality in QUALITIES]
    for before, after in pairwise(strategies):
        assert type(before) is not type(after) or boldness(before) < boldness(after)


@pytest.mark.parametrize("family", [family for family in PRESETS if family not in (DEMO, VIDEO_DEMO)])
def test_nothing_cautious_is_bolder_than_what_others_published_for_the_family(family):
    presets = PRESETS[family].values()
    published = [boldness(preset.strategy) for preset in presets if preset.evidence == "published"]
    cautious = [boldness(preset.strategy) for preset in presets if preset.evidence == "cautious"]
    assert not published or not cautious or max(cautious) < max(published)


def test_h3_is_for_the_twenty_steps_that_people_run():
    strategies = [PRESETS["MiniMax-H3"][quality].strategy for quality in QUALITIES]
    assert [strategy.residual_diff_threshold for strategy in strategies] == [0.08, 0.1, 0.12]
    assert {strategy.max_consecutive_cache_hits for strategy in strategies} == {2}
    assert all("20 steps" in choose("MiniMax-H3", quality, 20).words for quality in QUALITIES)


@pytest.mark.parametrize("family", UNPUBLISHED)
def test_a_family_that_nobody_published_for_is_named_and_gets_the_cautious_choice(family):
    choice = choose(family, "balanced", 20, model_name="ItsClass")
    assert choice.strategy == PRESETS[OTHER]["balanced"].strategy
    assert choice.words.startswith(f"{family}, balanced: ") and "not measured on this family" in choice.words
    assert family in (DOCS / "presets.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("steps", [1, 4, TOO_FEW_STEPS])
@every_preset
def test_few_steps_leave_the_model_as_it_is(family, quality, steps):
    choice = choose(family, quality, steps)
    assert choice.strategy is None
    assert "gain nothing" not in choice.words
    assert choice.words.startswith(f"With {steps} step{'s' if steps > 1 else ''} there is nothing to reuse")


def test_one_step_more_is_cached():
    assert choose(OTHER, QUALITIES[0], TOO_FEW_STEPS + 1).strategy is not None


@every_preset
def test_with_no_number_of_steps_few_are_left_alone_when_the_run_begins(family, quality):
    choice = choose(family, quality)
    few, many = (Schedule([1 - step / count for step in range(count + 1)]) for count in (TOO_FEW_STEPS, 20))
    assert "so all were computed" in choice.strategy.why_resting(few)
    assert not choice.strategy.why_resting(many)
    assert f"up to {TOO_FEW_STEPS} steps everything is computed" in choice.words


@pytest.mark.parametrize("steps", [4, 20])
def test_a_number_of_steps_is_said_to_be_one(steps):
    assert f"for the {steps} steps of the input steps; 0 takes" in choose(DEMO, QUALITIES[0], steps).words


def test_an_unknown_model_is_named_and_gets_the_cautious_choice():
    choice = choose("Nobody's", "fast", 20, model_name="PaintDiT")
    assert choice.strategy == PRESETS[OTHER]["fast"].strategy
    assert choice.words.startswith("PaintDiT, fast: ")
    assert "not measured on this family" in choice.words


@every_preset
def test_a_cautious_choice_is_at_most_as_bold_as_the_defaults(family, quality):
    preset = PRESETS[family][quality]
    assert preset.evidence != "cautious" or boldness(preset.strategy) <= boldness(type(preset.strategy)())


def test_a_unet_gets_what_needs_no_blocks():
    strategies = [preset.strategy for preset in PRESETS[UNET].values()]
    assert all(isinstance(strategy, TaylorSeerCache) and strategy.levels == ("output",) for strategy in strategies)


def test_an_unknown_quality_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="Choose one of: visually identical, balanced, fast"):
        choose(DEMO, "perfect", 20)


def test_the_page_shows_the_table():
    page = (DOCS / "presets.md").read_text(encoding="utf-8")
    assert table() in page, f"docs/presets.md should hold:\n{table()}"


def table():
    lines = ["| family | quality | strategy | settings | where it comes from |", "|---|---|---|---|---|"]
    for family, presets in PRESETS.items():
        for quality, preset in presets.items():
            cells = (family, quality, *described([preset.strategy]), f"{preset.evidence}: {preset.words}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("family", [DEMO, VIDEO_DEMO])
@pytest.mark.parametrize("quality", QUALITIES)
def test_what_is_called_measured_is_what_the_benchmark_measured(family, quality):
    preset = PRESETS[family][quality]
    rows = benchmarked(family, preset.strategy)
    for unit, numbers in (
        ("%", [100 * median(row["blocks"]) for row in rows]),
        ("dB", [median(row["psnr"]) for row in rows]),
    ):
        low, high = re.search(rf"(\d+)(?: to (\d+))? {unit}", preset.words).groups()
        assert [int(low), int(high or low)] == [round(min(numbers)), round(max(numbers))]


def benchmarked(family, strategy):
    """The benchmark's rows of this strategy, one for each flow shift."""
    file, shifts = {DEMO: ("quality.json", [1.0, 3.0, 6.0]), VIDEO_DEMO: ("video.json", [3.0, 8.0])}[family]
    results = json.loads((DOCS / "benchmarks" / file).read_text(encoding="utf-8"))["results"]
    assert strategy.repair == "on"
    if isinstance(strategy, FirstBlockCache):
        method, setting = "First Block Cache, repair", f"threshold {strategy.residual_diff_threshold:g}"
    elif strategy.target_speedup:
        method, setting = "TaylorSeer, asked for a speed-up", f"{strategy.target_speedup:g}x"
    else:
        method, setting = "TaylorSeer, repair", f"interval {strategy.cache_interval}"
    rows = [row for row in results if (row["method"], row["setting"]) == (method, setting)]
    assert sorted(row["shift"] for row in rows) == shifts
    return rows
