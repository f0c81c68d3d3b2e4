"""The benchmarks that print tables of docs/benchmarks, on a stand-in for the demo that samples in no time."""

import math
import re
from types import SimpleNamespace

import forms
import pytest
import repair
import torch
import wish
import yardsticks
from quality_rows import Row

from cache_core import Schedule
from cache_core.strategies.taylorseer import TaylorSeerCache

WIDTH = 64


class Demo:
    """A run of K computed steps runs K blocks, and is off by 1 / K; half of that with repair, and .9 by dpmpp_2m."""

    name = "nowhere"

    def __init__(self):
        self.subject = SimpleNamespace(
            shifts=(1.0, 3.0, 6.0),
            prompts=lambda count: [f"prompt {number}" for number in range(count)],
            noise=lambda seed: torch.full((1, 3, 8, 8), 1 + seed / 1000),
            decode=lambda latent: latent[None],
        )
        self.tally = SimpleNamespace(blocks=0, clear=lambda: setattr(self.tally, "blocks", 0))

    def sample(self, row, shift, prompts, noise):
        assert len(prompts) == len(noise) == 1  # one picture at a time
        computed = self.computed(row)
        self.tally.blocks += computed
        for _ in range(computed):
            torch.ones(WIDTH, WIDTH) @ torch.ones(WIDTH, WIDTH)
        half = 0.5 if getattr(row.strategy, "repair", "off") == "on" else 1.0
        return noise + half * {"dpmpp_2m": 0.9}.get(row.sampler, 1.0) / computed - 1

    def computed(self, row):
        if isinstance(row.strategy, TaylorSeerCache):
            return len(row.strategy.computed_steps(Schedule([1 - step / row.steps for step in range(row.steps + 1)])))
        return row.steps if row.strategy is None else math.ceil(0.6 * row.steps)


def numbers(line):
    """Those with one decimal, without those of the first column."""
    return [float(each) for each in re.findall(r"-?\d+\.\d", line.split("|", 2)[2])]


def test_repairs_table_has_a_line_for_each_cache_and_shift_and_what_each_picture_gained():
    lines = list(repair.table(Demo(), 4, "euler"))
    assert len(lines) == 3 * 4
    for line in lines:
        before, after, *_, gain = numbers(line)
        assert after > before and gain == pytest.approx(after - before, abs=0.11)
        assert line.endswith("| 4 of 4 |")


def test_a_wish_is_told_by_the_share_of_operations_that_ran():
    header, _, *lines = wish.work(Demo())
    assert len(lines) == 2 * len(wish.RUNS) and header.count("x: ") == len(wish.WISHES)
    of_taylorseer = next(line for line in lines if line.startswith("| TaylorSeer Cache | 20 steps, euler |"))
    assert numbers(of_taylorseer) == [75.0, 65.0, 50.0, 40.0, 35.0]


def test_how_close_a_wish_is_stands_beside_fewer_steps():
    _, _, *lines = wish.closeness(Demo(), 2)
    cells = {line.split("|")[1].strip(): line.split("|")[2:5] for line in lines}
    assert len(cells) == len(lines) and {"fewer steps, 12", "TaylorSeer Cache, 1.5x"} <= set(cells)
    assert all("65%" in cell and " / " in cell for cell in cells["TaylorSeer Cache, 1.5x"])
    assert all("60%" in cell and " / " not in cell for cell in cells["fewer steps, 12"])


def test_each_cache_has_its_yardsticks_of_as_many_calls_below(monkeypatch):
    demo = Demo()
    monkeypatch.setattr(yardsticks, "InComfyUI", lambda: demo)
    lines = list(yardsticks.table(yardsticks.Bench(2), "euler", 20))[2:]
    assert len(lines) == 3 * len(list(yardsticks.caches()))
    for cache, fewer, others in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        calls = numbers(cache)[0]
        assert cache.startswith("| **") and fewer.startswith(f"| {math.ceil(calls)} steps |")
        assert others.startswith(f"| {math.ceil(calls)} steps, best other |")
        assert min(numbers(others)[1:4]) > max(numbers(fewer)[1:4])  # dpmpp_2m is the best of them


def test_forms_are_compared_with_the_uncached_pictures_and_with_the_caches_own(monkeypatch, capsys):
    monkeypatch.setattr(forms, "InComfyUI", Demo)
    monkeypatch.setattr(forms, "PICTURES", 2)
    forms.main()
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 3 * len(forms.caches())
    assert all(line.count(" (") == 2 for line in told)


def test_the_stand_in_computes_what_a_row_asks_for():
    assert Demo().computed(Row("", strategy=TaylorSeerCache(cache_interval=2))) == 11
