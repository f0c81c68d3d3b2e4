"""The comparison of runs: its numbers, its table and its sheet."""

import json
import math

import pytest
import torch

from cache_core.compare.side_by_side import Sampled, SideBySide, aligned, described, instead_of, rows, table
from cache_core.compare.verdict import Verdict
from cache_core.strategies import all_strategies
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

pytest.importorskip("PIL", reason="sheets are drawn with Pillow, which every ComfyUI has")
from cache_core.compare import sheet as drawing
from cache_core.compare.layouts import LARGER, TONES, against_fewer_steps, in_rows

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
        "residual_diff_threshold 0.12, max_order 2; cache_interval 2",
    )
    assert described([TaylorSeerCache(target_speedup=1.5)])[1] == "target_speedup 1.5"  # which decides in its place


def test_columns_are_aligned():
    assert aligned([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"


def test_the_table_has_the_verdict_on_each_cache_below():
    uncached = run("Uncached", 4.0, share=1.0)
    cached = [run("Cache", 2.0, verdict=Verdict("worth it", "Worth it.", 10)).judged(uncached)]
    told = rows([uncached, *cached])
    assert table([uncached, *cached]).splitlines()[-1] == "Cache (settings): Worth it."
    assert [(row["verdict"], row["outcome"]) for row in told] == [(None, None), ("Worth it.", "worth it")]


def test_fewer_steps_name_the_cache_that_they_answer():
    cached = [run("One", 2.0), run("Other", 2.0)]
    assert [instead_of(each, cached) for each in cached] == ["instead of One", "instead of Other"]
    cached = [run("One", 2.0), Sampled("One", "threshold 0.2", 20, 2.0, 0.5, PICTURE)]
    assert [instead_of(each, cached) for each in cached] == [
        "instead of One, settings",
        "instead of One, threshold 0.2",
    ]


def test_the_pictures_are_the_uncached_one_then_all_caches_then_all_twins():
    levels = [torch.full((2, 3, 8, 8), level) for level in (0.0, 0.1, 0.2, 0.3)]
    uncached, one, other, twin = (run("Run", 1.0, pictures=pictures) for pictures in levels)
    pictures = SideBySide(uncached, [one, other], [None, twin]).pictures
    assert pictures.shape == (4, 3, 8, 8)
    assert pictures[:, 0, 0, 0].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_sheet_has_a_row_for_each_cache_and_even_margins(count):
    sheet = against_fewer_steps(comparison(count=count), "title", "subtitle")
    width, scale = 60 * 7, 60 * 7 / 256  # 40 pixels high, enlarged to at least 256
    assert sheet.width == 2 * round(32 * scale) + round(260 * scale * LARGER) + 4 * (width + round(12 * scale))
    assert sheet.height > (count + 1) * 280
    paper = sheet.getpixel((0, 0))
    assert max(paper) < 64  # as dark as the page
    for edge in ((0, 0, sheet.width, 20), (0, sheet.height - 20, sheet.width, sheet.height), (0, 0, 20, sheet.height)):
        assert {color for _, color in sheet.crop(edge).getcolors()} == {paper}


def test_a_row_without_a_twin_says_why_where_the_twin_would_be():
    both = comparison()
    mixed = SideBySide(both.uncached, both.cached, [both.twins[0], None])
    sheets = [against_fewer_steps(compared, "t") for compared in (both, mixed)]
    places = [sheet.crop((sheet.width // 2 + 300, sheet.height - 300, sheet.width, sheet.height)) for sheet in sheets]
    paper, colors = sheets[0].getpixel((0, 0)), [place.getcolors(1 << 24) for place in places]
    shares = [sum(n for n, color in found if color == paper) / sum(n for n, _ in found) for found in colors]
    assert shares[0] < 0.4 and 0.7 < shares[1] < 0.99  # a picture and its difference; words


def test_differences_are_eight_times_as_bright():
    uncached = run("Uncached", 4.0, pictures=torch.full((1, 3, 256, 256), 0.5))
    cached = run("Cache", 2.0, offset=0.05, pictures=torch.full((1, 3, 256, 256), 0.5)).judged(uncached)
    sheet = against_fewer_steps(SideBySide(uncached, [cached], [cached]), "t")
    assert sheet.getpixel((sheet.width - 100, sheet.height - 100)) == (102, 102, 102)  # 0.05 * 8 * 255


def luminance(color):
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("color", [drawing._INK, drawing._GREY, *drawing.TONES.values()])
def test_words_stand_out_from_the_sheet(color):
    """The contrast that WCAG asks of words, and half as much again: the sheet is shrunk on a node."""
    assert (luminance(color) + 0.05) / (luminance(drawing._PAPER) + 0.05) > 1.5 * 4.5


def test_a_verdict_is_in_its_colour():
    uncached, by_outcome = run("Uncached", 4.0), {}
    for outcome, tone in TONES.items():
        cached = run("Cache", 2.0, offset=0.01, verdict=Verdict(outcome, "worth it")).judged(uncached)
        sheet = against_fewer_steps(SideBySide(uncached, [cached], [None]), "t")
        by_outcome[outcome] = {color for _, color in sheet.crop((0, 0, 600, sheet.height)).getcolors(1 << 24)}
        color = drawing.TONES[tone]
        assert tuple(int(color[at : at + 2], 16) for at in (1, 3, 5)) in by_outcome[outcome]
    assert {TONES[outcome] for outcome in ("worth it", "too close", "no better")} == {"good", "unsure", "bad"}


def test_a_sheet_in_rows_has_all_pictures_of_each_run_and_how_they_differ():
    pictures = torch.stack([torch.full((3, 200, 200), level) for level in (0.2, 0.4, 0.6)])
    runs = [run("Uncached", 4.0, pictures=pictures), run("Cache", 2.0, offset=0.1, pictures=pictures)]
    sheet = in_rows(runs, ["a", "b", "c"], "title")
    assert sheet.width == 2 * 32 + 260 + 3 * (12 + 200)
    centers = [32 + 260 + 12 + 212 * column + 100 for column in range(3)]
    below = [sheet.height - 32 - 100 - 212 * row for row in (2, 1, 0)]
    levels = [[sheet.getpixel((x, y))[0] for x in centers] for y in below]
    assert levels == [[51, 102, 153], [76, 128, 179], [204, 204, 204]]  # of 255; .1 times 8


def test_words_that_end_a_short_row_have_the_width_that_is_left():
    picture, words = torch.zeros(3, 256, 256), drawing.Label(settings="word " * 60)
    short = drawing.draw("t", [[words], [picture, picture, picture]])
    long = drawing.draw("t", [[words, None, None], [picture, picture, picture]])
    assert short.width == long.width and short.height < long.height


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
    [((64, 64), (256, 256)), ((256, 320), (320, 256)), ((2160, 3840), (512, 288)), ((768, 512), (341, 512))],
)
def test_small_pictures_are_enlarged_by_whole_numbers_and_large_ones_shrunk(size, shown):
    assert drawing._displayed(torch.zeros(3, *size), 256) == shown
