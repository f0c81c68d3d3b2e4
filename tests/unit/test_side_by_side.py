"""The comparison of runs: its numbers, its table and its sheet."""

import json
import math

import pytest
import torch

from cache_core.compare.side_by_side import Sampled, SideBySide, aligned, described, rows, table
from cache_core.strategies import all_strategies
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

pytest.importorskip("PIL", reason="sheets are drawn with Pillow, which every ComfyUI has")
from cache_core.compare import sheet as drawing
from cache_core.compare.layouts import NO_TWIN, in_columns, in_rows

PICTURE = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0))
LONGEST = max((name for kind in all_strategies() for name in vars(kind()) if name.islower()), key=len)


def run(name, seconds, offset=0.0, steps=20, share=0.5, pictures=PICTURE, **more):
    return Sampled(name, "settings", steps, seconds, share, (pictures + offset).clamp(0, 1), **more)


def comparison(twins=True, count=2):
    uncached = run("Uncached", 4.0, share=1.0)
    cached = [run(f"Cache {number}", 2.0, offset=0.01 * number).judged(uncached) for number in range(count)]
    fewer = [run("Fewer steps, no cache", 1.9, offset=0.05, steps=10).judged(uncached) if twins else None] * count
    return SideBySide(uncached, cached, fewer)


def test_rows_are_the_uncached_run_then_each_cache_with_its_twin():
    told = rows(comparison().runs)
    twin = "Fewer steps, no cache"
    assert [row["name"] for row in told] == ["Uncached", "Cache 0", twin, "Cache 1", twin]
    assert [row["speed_up"] for row in told] == pytest.approx([1.0, 2.0, 4 / 1.9, 2.0, 4 / 1.9])


def test_rows_are_json_that_a_browser_reads_even_of_identical_pictures():
    told = json.loads(json.dumps(rows(comparison().runs), allow_nan=False))
    assert (told[1]["psnr"], told[1]["ssim"], told[1]["identical"]) == (None, 1.0, True)
    assert told[3]["psnr"] == pytest.approx(40, abs=0.5)  # a hundredth off, but where it is clamped
    assert not told[3]["identical"]


def test_the_table_says_equal_for_identical_and_a_dash_for_what_nobody_counted():
    uncached = run("Uncached", 4.0, share=1.0)
    other = run("Other", 2.0, share=None, note="what there is to say").judged(uncached)
    header, first, line, note = table([uncached, other]).splitlines()
    assert first.startswith("Uncached (settings)")
    assert line.split()[-6:] == ["20", "-", "2.00", "2.00x", "equal", "1.000"]
    assert note == "Other: what there is to say"
    assert header.index("steps") + len("steps") == line.index("20") + len("20")


def test_a_run_is_judged_against_the_reference():
    uncached = run("Uncached", 4.0)
    assert run("Same", 1.0).judged(uncached).psnr == math.inf
    assert run("Other", 1.0, offset=0.1).judged(uncached).ssim < 1


def test_settings_told_are_the_first_and_what_is_not_as_it_comes():
    strategies = [FirstBlockCache(max_order=2), TaylorSeerCache()]
    assert described(strategies) == (
        "First Block Cache + TaylorSeer Cache",
        "residual_diff_threshold 0.12, max_order 2; cache_interval 4",
    )


def test_columns_are_aligned():
    assert aligned([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_sheet_has_a_column_for_each_run_and_even_margins(count):
    sheet = in_columns(comparison(count=count), "title", "subtitle")
    width = 60 * 7  # 40 pixels high, enlarged to at least 256
    scale = width / 256
    expected = 2 * round(32 * scale) + (count + 1) * width + count * round(12 * scale)
    assert sheet.width == expected
    paper = sheet.getpixel((0, 0))
    for edge in ((0, 0, sheet.width, 20), (0, sheet.height - 20, sheet.width, sheet.height), (0, 0, 20, sheet.height)):
        assert {color for _, color in sheet.crop(edge).getcolors()} == {paper}


def test_the_sheet_without_twins_is_shorter():
    assert in_columns(comparison(twins=False), "t").height < in_columns(comparison(), "t").height - 2 * 280


def test_a_cache_without_a_twin_is_explained_beside_one_that_has_one():
    both = comparison()
    mixed = SideBySide(both.uncached, both.cached, [both.twins[0], None])
    assert in_columns(mixed, "t").size == in_columns(both, "t").size
    assert NO_TWIN


def test_differences_are_eight_times_as_bright():
    uncached = run("Uncached", 4.0, pictures=torch.full((1, 3, 256, 256), 0.5))
    cached = run("Cache", 2.0, offset=0.05, pictures=torch.full((1, 3, 256, 256), 0.5)).judged(uncached)
    sheet = in_columns(SideBySide(uncached, [cached], [None]), "t")
    assert sheet.getpixel((sheet.width - 100, sheet.height - 100)) == (102, 102, 102)  # 0.05 * 8 * 255


def test_a_sheet_in_rows_has_a_row_for_each_run_with_all_its_pictures():
    pictures = torch.stack([torch.full((3, 200, 200), level) for level in (0.2, 0.4, 0.6)])
    runs = [run("Uncached", 4.0, pictures=pictures), run("Cache", 2.0, offset=0.2, pictures=pictures)]
    sheet = in_rows(runs, ["a", "b", "c"], "title")
    assert sheet.width == 2 * 32 + 260 + 3 * (12 + 200)
    centers = [32 + 260 + 12 + 212 * column + 100 for column in range(3)]
    below = [sheet.height - 32 - 100 - 212 * row for row in (1, 0)]
    levels = [[sheet.getpixel((x, y))[0] for x in centers] for y in below]
    assert levels == [[51, 102, 153], [102, 153, 204]]  # of 255


@pytest.mark.parametrize("size", [(64, 64), (480, 832), (1024, 1024), (2160, 3840), (1200, 300)])
def test_no_word_leaves_its_column(size):
    words = drawing.Label(
        "First Block Cache + Pyramid Attention Broadcast", f"{LONGEST} 1000", "100% computed, 1234.56 s"
    )
    width, _ = drawing._displayed(torch.zeros(3, *size), 256)
    scale = max(1.0, width / 256)
    for line in drawing._lines(words, scale, width):
        assert drawing.ImageFont.load_default(line.size).getlength(line.text) <= width


def test_every_word_is_on_the_sheet():
    words = "residual_diff_threshold 0.12, unconditional_batch_timestep_skip_start -1\nsecond line"
    lines = drawing._wrapped(words, 15, "#000", 100)
    assert "".join(line.text for line in lines).replace(" ", "") == words.replace(" ", "").replace("\n", "")
    assert len(lines) > 5


@pytest.mark.parametrize(
    ("size", "shown"),
    [((64, 64), (256, 256)), ((256, 320), (320, 256)), ((2160, 3840), (768, 432)), ((768, 512), (512, 768))],
)
def test_small_pictures_are_enlarged_by_whole_numbers_and_large_ones_shrunk(size, shown):
    assert drawing._displayed(torch.zeros(3, *size), 256) == shown
