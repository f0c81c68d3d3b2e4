"""Settings: a bad value is an error that names the input and the value and says what to do."""

import re
from dataclasses import dataclass, fields
from itertools import groupby
from math import inf, nan
from pathlib import Path

import pytest
import torch

from cache_core.strategies import all_strategies
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy import Strategy, setting


@dataclass(frozen=True)
class Switched(Strategy):
    """With a setting that is on or off: ours have none."""

    title = "Switched"
    is_switched_on: bool = setting(False, "On or off.")


BAD = [
    *((FirstBlockCache, "residual_diff_threshold", value) for value in (nan, inf, -0.1, 1.5, "0.1", None, True, [0.1])),
    *((FirstBlockCache, "start_percent", value) for value in (nan, -0.1, 1.1, None)),
    *((FirstBlockCache, "end_percent", value) for value in (nan, -0.1, 1.1, "all")),
    *((FirstBlockCache, "max_consecutive_cache_hits", value) for value in (-2, 101, 1.5, nan, None, False)),
    *((FirstBlockCache, "target_speedup", value) for value in (nan, inf, -0.1, 5.1, "2", None, True)),
    *((FirstBlockCache, "max_order", value) for value in (-1, 4, 0.5, "1")),
    *((TaylorSeerCache, "cache_interval", value) for value in (0, 21, 2.5, nan, "4")),
    *((TaylorSeerCache, "max_order", value) for value in (-1, 4, 1.5)),
    *((TaylorSeerCache, "disable_cache_before_step", value) for value in (-1, 1001, 2.5, None)),
    *((TaylorSeerCache, "disable_cache_after_step", value) for value in (-2, 1001, 7.5, inf)),
    *((TaylorSeerCache, "cache_level", value) for value in ("modules", "", None, 1, ["model"])),
    *((TaylorSeerCache, "spacing", value) for value in ("sigmas", None)),
    *((TaylorSeerCache, "weights", value) for value in ("newton", None)),
    *((TaylorSeerCache, "cache_identifiers", value) for value in (("(",), "attn", (3,), 5)),
    *((TaylorSeerCache, "skip_predict_identifiers", value) for value in (("a", "*"), "attn", (None,))),
    *((TaylorSeerCache, "taylor_factors_dtype", value) for value in ("bfloat16", torch.int8, torch.bool, 16)),
    *((Switched, "is_switched_on", value) for value in ("no", 2, None)),
]
ADVICE = ("Set ", "Choose ", "Escape ", "Lower ", "Raise ", "Give ", "Use ", "Leave ", "Write ")


@pytest.mark.parametrize(("strategy", "name", "value"), BAD, ids=lambda part: getattr(part, "__name__", repr(part)))
def test_a_bad_value_is_an_error_that_teaches(strategy, name, value):
    with pytest.raises(ValueError) as error:
        strategy(**{name: value})
    message = str(error.value)
    shown = value[-1] if isinstance(value, tuple) else value
    assert strategy.title in message
    assert name in message
    assert str(shown) in message
    assert any(word in message for word in ADVICE)


@pytest.mark.parametrize(
    "value", ["often " * 9999, list(range(9999)), 10**400, torch.zeros(99, 99), torch.ones(2).numpy()]
)
@pytest.mark.parametrize("name", ["cache_interval", "cache_level"])
def test_whatever_a_node_hands_on_is_refused_in_few_words(name, value):
    with pytest.raises(ValueError, match=f"TaylorSeer Cache: {name} is .*(Set|Choose)") as error:
        TaylorSeerCache(**{name: value})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.5), (1.0, 0.0)])
def test_a_range_the_wrong_way_round_is_told_with_what_to_do(start, end):
    told = FirstBlockCache(start_percent=start, end_percent=end).contradiction
    assert told.startswith(f"start_percent {start:g} is after end_percent {end:g}")
    assert told.endswith("lower the one or raise the other")


@pytest.mark.parametrize(("before", "after"), [(3, 3), (5, 2), (0, 0)])
def test_steps_that_contradict_each_other_are_told_with_what_to_do(before, after):
    told = TaylorSeerCache(disable_cache_before_step=before, disable_cache_after_step=after).contradiction
    assert told.startswith(f"disable_cache_before_step {before} and disable_cache_after_step {after} leave no step.")
    assert told.endswith("Raise the latter, or set it to -1 (never)")


@pytest.mark.parametrize("strategy", all_strategies(), ids=lambda strategy: strategy.__name__)
def test_defaults_do_not_contradict_each_other(strategy):
    assert strategy().contradiction == ""


@pytest.mark.parametrize("strategy", all_strategies(), ids=lambda strategy: strategy.__name__)
def test_defaults_are_good_and_explained(strategy):
    assert not strategy().is_off
    for item in fields(strategy):
        assert len(item.metadata["help"]) > 20
    assert strategy.title
    assert strategy.summary.endswith(".")
    assert strategy.source


@pytest.mark.parametrize("strategy", all_strategies(), ids=lambda strategy: strategy.__name__)
def test_both_ends_of_every_range_are_allowed(strategy):
    for item in fields(strategy):
        for bound in (item.metadata["minimum"], item.metadata["maximum"]):
            if bound is not None and not re.search(r"_(start|end|percent|after_step)$", item.name):  # pairs
                assert getattr(strategy(**{item.name: bound}), item.name) == bound


@pytest.mark.parametrize("strategy", all_strategies(), ids=lambda strategy: strategy.__name__)
def test_settings_are_frozen(strategy):
    with pytest.raises(AttributeError):
        setattr(strategy(), fields(strategy)[0].name, 0)


def test_whole_numbers_are_fine_where_numbers_are():
    assert FirstBlockCache(residual_diff_threshold=1).residual_diff_threshold == 1


def test_strategies_are_found_by_themselves():
    assert {FirstBlockCache, TaylorSeerCache} <= set(all_strategies())


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
WORDS = ("careful", "balanced", "fast")


def test_a_tooltip_that_says_careful_balanced_or_fast_says_it_of_the_readmes_numbers():
    named = {row[0]: dict(zip(WORDS, row[2:])) for row in ROW.findall(README)}
    tooltips = {each.name: each.metadata["help"] for strategy in all_strategies() for each in fields(strategy)}
    assert len(named) > 3

    said = {
        (name, word): number
        for name in named
        for number, word in re.findall(r"([\d.]+(?: to [\d.]+)?) (careful|balanced|fast)\b", tooltips[name])
    }

    assert {name for name, _ in said} == {"residual_diff_threshold", "cache_interval", "target_speedup"}
    assert {at: named[at[0]][at[1]] for at in said} == said


MODELS = re.compile(r"1024²|14B|480p|720p|MiniMax-H3")


def test_a_tooltip_gives_the_bytes_of_the_readmes_table():
    for strategy in all_strategies():
        (row,) = re.findall(rf"^\| Apply {strategy.title.removesuffix(' Cache')}.*$", README, re.MULTILINE)
        (told,) = {
            found
            for each in fields(strategy)
            for found in re.findall(r"Flux [^;]+H3 [\d./]+ GB", each.metadata.get("help", ""))
        }

        numbers = [
            re.findall(r"\d+(?:\.\d+)?", MODELS.sub("", text)) for text in (row.split("GiB")[1].split(" | ")[0], told)
        ]
        table, tooltip = ([one for one, _ in groupby(each)] for each in numbers)
        assert len(table) >= 4
        assert table[: len(tooltip)] == tooltip
