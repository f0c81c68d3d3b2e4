"""The README's numbers are those that the benchmarks keep."""

import re
from pathlib import Path

import pytest
from quality_results import Results

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEFAULTS = {
    "TaylorSeer": ("TaylorSeer, repair", "interval 2"),
    "First Block Cache": ("First Block Cache, repair", "threshold 0.12"),
    "FasterCache": ("FasterCache", "attention 2, negative prompt 2"),
    "Pyramid Attention Broadcast": ("Pyramid Attention Broadcast", None),
}
COLUMNS = (("quality", 3.0), ("video", 3.0), ("video", 8.0))
RANGES = {"quality": "range 2", "video": "self 2, cross 1"}  # Pyramid Attention Broadcast's, as each file calls them


@pytest.mark.parametrize("strategy", DEFAULTS)
@pytest.mark.parametrize("column", range(len(COLUMNS)))
def test_the_table_of_defaults_is_what_was_measured(strategy, column):
    cells = re.findall(rf"^\| {strategy} \|(.*)\|$", README, re.MULTILINE)[0].split("|")
    file, shift = COLUMNS[column]
    results = Results.read(ROOT / "docs" / "benchmarks" / f"{file}.json")
    method, setting = DEFAULTS[strategy]
    (result,) = (each for each in results.of(shift, method) if each.setting == (setting or RANGES[file]))
    time, decibels = result.median("time"), result.median("psnr")
    if time >= 1:
        assert cells[column].strip() == "slower"
        return
    fewer = round(decibels - results.gain(result, "time"))
    cache, other = (
        f"**{value}**" if value == max(round(decibels), fewer) else f"{value}" for value in (round(decibels), fewer)
    )
    assert cells[column].strip() == f"{time:.0%}".replace("%", " %") + f", {cache} ({other})"
