"""What was measured on a user's model: the file's text, whoever wrote it, which entry fits, and what is said of it."""

import json
import math
from dataclasses import replace
from datetime import date

import pytest
from test_finding import Model, found

from cache_core.compare.found import CLOSENESS, SPEED_UP, Wish
from cache_core.measured import MOST_ENTRIES, Identity, entry_for, fitting, shared, with_entry
from cache_core.measured_text import MOST_BYTES, Newer, as_text, from_text
from cache_core.presets import DEMO, QUALITIES, WISH_FOR, choose
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.step import Schedule

MODEL = Identity("Flux.1", 780, 11_901_408_320, "0123456789abcdef" * 2, 0.7595)
DAY = date(2026, 12, 1)


def entry(wish=Wish("hardly"), model=MODEL, day=DAY, **lifts):  # noqa: B008 - it is frozen
    return entry_for(found(Model(**lifts), wish), model, "euler", "simple", 3.5, "NVIDIA H100", day)


def told(**changes):
    """The JSON of a file with one entry, changed."""
    text = json.loads(as_text([entry()]))
    text["entries"][0] |= changes
    return text


def written(tree):
    return json.dumps(tree).encode()


def test_what_is_written_is_read_back():
    entries = (entry(), entry(Wish(SPEED_UP, 2.0)), entry(taylor=6.0), replace(entry(), decibels=100.0))
    assert from_text(as_text(entries).encode()) == entries
    assert {type(each.strategy) for each in entries} == {FirstBlockCache, TaylorSeerCache}
    assert entries[0].steps == 20 and entries[0].decibels >= 38 and entries[0].date == "2026-12-01"
    assert from_text(as_text([]).encode()) == ()


def test_nothing_is_kept_of_a_search_that_found_no_cache():
    assert entry(fewer=30.0) is None


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[]", b"{}", b'"version"', b'{"version": 1}',
        b'{"version": true, "entries": []}',
        b'{"version": 0, "entries": []}', b'{"version": 1, "entries": {}}', b'{"version": 1, "entries": [[]]}',
        b'{"version": 1, "entries": [], "more": 1}', b'{"version": NaN, "entries": []}',
        b"[" * 100_000, b'{"a":' * 40_000, b" " * (MOST_BYTES + 1), b'{"version": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda text: text[:20].decode("latin-1"),
)  # fmt: skip
def test_a_damaged_file_is_an_error_in_a_few_words(text):
    with pytest.raises(ValueError) as refused:
        from_text(text)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "Pickle"}, {"strategy": "PyramidAttentionBroadcast"}, {"strategy": None}, {"settings": {}},
        {"settings": {"residual_diff_threshold": 2.0}}, {"settings": {"residual_diff_threshold": 0.0}},
        {"settings": {"residual_diff_threshold": "0.1"}}, {"settings": {"residual_diff_threshold": [0.1]}},
        {"settings": {"residual_diff_threshold": True}}, 
        {"settings": {"residual_diff_threshold": 0.1, "repair": "yes"}},
        {"settings": {"residual_diff_threshold": 0.1, "max_order": 3}}, {"settings": {"repair": "on"}},
        {"strategy": "TaylorSeerCache", "settings": {"cache_interval": 2.5}},
        {"strategy": "TaylorSeerCache", "settings": {"cache_interval": 10**30}},
        {"strategy": "TaylorSeerCache", "settings": {"cache_interval": 2, "target_speedup": 1.0}},
        {"strategy": "TaylorSeerCache", "settings": {"cache_interval": 2, "target_speedup": 0.5}},
        {"strategy": "TaylorSeerCache", "settings": {"target_speedup": 1.5}},
        {"wish": "perfect"}, {"wish": SPEED_UP}, {"wished_speed_up": 2.0}, {"wished_speed_up": "2"},
        {"steps": 0}, {"steps": 10**9}, {"steps": 20.0}, {"steps": True}, {"cfg": -1}, {"cfg": 1e999},
        {"speed_up": math.nan}, {"decibels": math.inf}, {"decibels": None}, {"decibels": 1e300},
        {"date": "2026-13-01"}, {"date": "yesterday"}, {"date": 20261201}, {"device": "x" * 101}, {"device": "a\nb"},
        {"device": "\x1b[31m"}, {"sampler": ""}, {"scheduler": {"a": 1}}, {"more": 1}, {"model": "Flux.1"},
        {"model": {"family": "Flux.1"}}, {"model": {**vars(MODEL), "weights": "../../etc/passwd"}},
        {"model": {**vars(MODEL), "parameters": -1}}, {"model": {**vars(MODEL), "halfway": "0.5"}},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_that_no_search_gives_is_refused(changes):
    with pytest.raises(ValueError) as refused:
        from_text(written(told(**changes)))
    assert len(str(refused.value)) < 300


def test_an_entry_that_lacks_something_and_too_many_entries_are_refused():
    for name in told()["entries"][0]:
        lacking = told()
        del lacking["entries"][0][name]
        with pytest.raises(ValueError, match="other fields"):
            from_text(written(lacking))
    many = told()
    many["entries"] *= MOST_ENTRIES + 1
    with pytest.raises(ValueError, match="more than 200 entries"):
        from_text(written(many))


def test_a_file_of_a_later_version_is_known_as_one():
    with pytest.raises(Newer):
        from_text(b'{"version": 2, "models": {}}')
    with pytest.raises(Newer):
        from_text(written({**told(), "version": 10**9}))


def test_a_file_that_is_full_stays_below_what_is_read():
    entries = tuple(replace(entry(), steps=1 + number) for number in range(MOST_ENTRIES))
    more = with_entry(entries, replace(entry(), steps=9999))
    assert len(more) == MOST_ENTRIES and more[-1].steps == 9999 and more[0].steps == 2  # the oldest is gone
    long = tuple(replace(each, device="é" * 100, sampler="é" * 100, scheduler="é" * 100) for each in more)
    assert len(as_text(long).encode()) < MOST_BYTES


def test_a_later_search_replaces_its_like_and_no_other():
    first, other = entry(day=date(2026, 11, 1)), replace(entry(), cfg=1.0)
    later = entry()
    assert with_entry((first, other), later) == (other, later)


def test_the_newest_entry_of_this_model_and_wish_fits():
    old, new = entry(day=date(2026, 11, 1)), replace(entry(), steps=30)
    entries = (new, old, replace(entry(), model=replace(MODEL, halfway=0.5)), entry(Wish("draft")))
    assert fitting(entries, MODEL, "hardly") == new
    assert fitting(entries, MODEL, "hardly", 20) == old
    assert fitting(entries, MODEL, "hardly", 25) is None
    assert fitting(entries, MODEL, "can't see it") is None
    assert fitting(entries, replace(MODEL, weights="0" * 32), "hardly") is None
    twice = (old, replace(old, speed_up=9.0))
    assert fitting(twice, MODEL, "hardly") == twice[1]  # of one day the last


def test_each_quality_is_a_wish():
    assert WISH_FOR == {"visually identical": "can't see it", "balanced": "hardly", "fast": "draft"}
    assert [*WISH_FOR] == [*QUALITIES] and [*WISH_FOR.values()] == [*CLOSENESS]


def test_a_measured_entry_comes_before_the_table_and_says_when_and_with_what_it_was_measured():
    measured = entry()
    choice = choose("Flux.1", "balanced", 0, "Flux", measured)
    numbers = f"{measured.speed_up:.1f}x, {measured.decibels:.0f} dB (20 steps, euler, simple, cfg 3.5)"
    assert f"Measured on this model on 2026-12-01: {numbers}." in choice.words
    assert choice.words.startswith("Flux.1, balanced: First Block Cache, residual_diff_threshold ")
    assert choice.strategy == replace(measured.strategy, few_steps="compute all")
    assert choice.steps == 20  # so that a run of others says so
    assert choose(DEMO, "balanced").steps == 0


def test_a_measured_entry_keeps_few_steps_alone_unless_it_was_measured_with_few():
    of_20, of_6 = entry(), replace(entry(), steps=6)
    few = Schedule([1 - step / 6 for step in range(7)])
    assert choose("Flux.1", "balanced", 0, "", of_20).strategy.why_resting(few)
    assert not choose("Flux.1", "balanced", 0, "", of_6).strategy.why_resting(few)
    assert choose("Flux.1", "balanced", 6, "", of_6).strategy == of_6.strategy


def test_what_others_measured_says_so_and_on_what():
    (measured,) = shared([entry()])
    assert "Measured on this model by a user (NVIDIA H100) on 2026-12-01" in measured.told
