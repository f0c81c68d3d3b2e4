"""The script that makes the help pages' pictures: its sheets, without the ComfyUI that it samples in."""

import importlib.util
from pathlib import Path

import pytest
import torch
import video_pictures
from PIL import Image

from cache_core.compare.sheet import Label

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "help_pictures.py"


@pytest.mark.parametrize("rows", [1, 4])
def test_a_sheet_has_a_row_for_each_setting_and_a_column_for_each_prompt(tmp_path, rows):
    spec = importlib.util.spec_from_file_location("help_pictures", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.HELP = tmp_path
    (tmp_path / "RefrainLoadDemo").mkdir()
    colors = [[torch.full((3, 64, 64), (row + 3) / 8) for _ in script.SHOWN] for row in range(rows)]
    shown = [[Label(f"row {row}"), *pictures] for row, pictures in enumerate(colors)]

    script._save("Title", shown, "RefrainLoadDemo", "x")

    sheet = Image.open(tmp_path / "RefrainLoadDemo" / "x.jpg").convert("L")
    sizes = dict.fromkeys(range(rows), 0)
    for count, level in sheet.getcolors(1 << 16):
        for row in sizes:
            sizes[row] += count if abs(level - 255 * (row + 3) / 8) < 3 else 0
    pixels = len(script.SHOWN) * 192**2  # enlarged three times
    assert all(0.95 * pixels < size < 1.1 * pixels for size in sizes.values()), sizes


def test_videos_are_shown_by_a_row_of_frames_for_each_prompt_and_one_by_four_frames():
    videos = [[torch.full((3, 96, 96), (row + 3 + frame / 20) / 8) for frame in range(15)] for row in range(3)]

    sheet, card = video_pictures.sheet(videos).convert("L"), video_pictures.thumbnail(videos[1]).convert("L")

    for row in range(3):
        for frame in video_pictures.IN_ROW:
            level = round(255 * (row + 3 + frame / 20) / 8)
            count = sum(count for count, each in sheet.getcolors(1 << 16) if abs(each - level) < 2)
            assert 0.95 * 192**2 < count < 1.1 * 192**2, (row, frame)  # enlarged twice
    corners = [card.getpixel((x, y)) for y in (9, 500) for x in (9, 500)]
    assert corners == [round(255 * (4 + frame / 20) / 8) for frame in video_pictures.ON_CARD]
