"""Draws pictures and words on one sheet, in rows and columns. Needs Pillow."""

import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_PAPER, _INK, _GREY = "#1b1d21", "#f1eee8", "#a3a8b0"  # dark, like ComfyUI's page
TONES = {"good": "#5fd38d", "unsure": "#f0d95a", "bad": "#ff8a4c", "": _INK}
_LARGEST = 512  # pixels: above this, four pictures in a row make a sheet that is no pleasure to open
_WIDTH = 256  # pixels of a picture for which the sizes below are made; larger pictures have larger words
_MARGIN, _GAP, _LABEL_WIDTH = 32, 12, 260
_TITLE, _NAME, _TEXT = 28, 20, 15


class Label(NamedTuple):
    """Words in a cell, top to bottom."""

    name: str = ""
    settings: str = ""
    summary: str = ""
    verdict: str = ""
    tone: str = ""  # of the verdict: a key of TONES


Sheet = Image.Image
Cell = Label | Tensor | None  # a picture is (3, height, width) in 0..1, and all are of one size


class _Line(NamedTuple):
    text: str
    size: int
    color: str


class _Row(NamedTuple):
    cells: Sequence[Cell]
    words: list[list[_Line]]  # of each cell
    height: int
    has_pictures: bool


def draw(
    title: str, rows: Sequence[Sequence[Cell]], subtitle: str = "", smallest: int = 144, words: float = 1.0
) -> Sheet:
    """The sheet. Words beside pictures stand at half their height, words in a row of their own on its lower edge.

    Pictures whose shorter side has fewer pixels than `smallest` are enlarged by a whole number, very large ones shrunk.
    `words` makes the words larger, against the pictures. Words that end a short row have all the width that is left.
    """
    size = _displayed(next(cell for row in rows for cell in row if _is_picture(cell)), smallest)
    scale = max(1.0, size[0] / _WIDTH)
    margin, gap = round(_MARGIN * scale), round(_GAP * scale)
    scale *= words
    columns = [size[0] if any(map(_is_picture, cells)) else round(_LABEL_WIDTH * scale) for cells in zip_longest(*rows)]
    lefts = [margin + sum(columns[:index]) + gap * index for index in range(len(columns))]
    right = lefts[-1] + columns[-1]
    head = _wrapped(title, round(_TITLE * scale), _INK, right - margin)
    head += _wrapped(subtitle, round(_TEXT * scale), _GREY, right - margin)
    made = [_row(cells, [*columns[: len(cells) - 1], right - lefts[len(cells) - 1]], size[1], scale) for cells in rows]
    made[1:] = [row if row.has_pictures else row._replace(height=row.height + 2 * gap) for row in made[1:]]

    top = margin + _height(head) + gap
    sheet = Image.new("RGB", (right + margin, top + sum(row.height + gap for row in made) - gap + margin), _PAPER)
    _write(sheet, margin, margin, head)
    for row in made:
        for cell, words, left in zip(row.cells, row.words, lefts):
            if _is_picture(cell):
                sheet.paste(_resized(to_image(cell), size), (left, top))
            free = row.height - _height(words)
            _write(sheet, left, top + (free // 2 if row.has_pictures else free), words)
        top += row.height + gap
    return sheet


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, height, width) in 0..1 as a Pillow image."""
    levels = (picture.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _row(cells: Sequence[Cell], columns: Sequence[int], picture_height: int, scale: float) -> _Row:
    words = [_lines(cell, scale, width) if isinstance(cell, Label) else [] for cell, width in zip(cells, columns)]
    has_pictures = any(map(_is_picture, cells))
    return _Row(cells, words, max([picture_height * has_pictures, *map(_height, words)]), has_pictures)


def _is_picture(cell: Cell) -> bool:
    return isinstance(cell, Tensor)


def _displayed(picture: Tensor, smallest: int) -> tuple[int, int]:
    """Width and height on the sheet."""
    height, width = picture.shape[-2:]
    factor = -(-smallest // min(width, height))
    if factor == 1:
        factor = min(1.0, _LARGEST / max(width, height))
    return round(width * factor), round(height * factor)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    enlarging = size > image.size
    return image.resize(size, Image.Resampling.BICUBIC if enlarging else Image.Resampling.LANCZOS)


def _lines(label: Label, scale: float, width: int) -> list[_Line]:
    space = [_Line("", round(_TEXT * scale / 2), _INK)] if label.verdict else []
    return [
        *_wrapped(label.name, round(_NAME * scale), _INK, width),
        *_wrapped(label.settings, round(_TEXT * scale), _GREY, width),
        *_wrapped(label.summary, round(_TEXT * scale), _INK, width),
        *space,
        *_wrapped(label.verdict, round(_NAME * scale), TONES[label.tone], width),
    ]


def _wrapped(text: str, size: int, color: str, width: int) -> list[_Line]:
    """Lines no wider than this: broken at spaces and, inside a word that is too long, after its underscores."""
    font = ImageFont.load_default(size)
    texts: list[str] = []
    for paragraph in text.splitlines():
        texts.append("")
        for word in paragraph.split():
            parts = [word] if font.getlength(word) <= width else re.findall(r"[^_]*_|[^_]+", word)
            for joint, part in zip([" ", *[""] * len(parts)], parts):
                longer = f"{texts[-1]}{joint}{part}".lstrip()
                if font.getlength(longer) <= width:
                    texts[-1] = longer
                else:
                    texts.append(part)
    return [_Line(line, size, color) for line in texts if line]


def _height(lines: Sequence[_Line]) -> int:
    return sum(map(_line_height, lines))


def _line_height(line: _Line) -> int:
    return line.size * 7 // 5  # 1.4: airy, but lines of one label still belong together


def _write(sheet: Sheet, x: int, y: int, lines: Sequence[_Line]) -> None:
    pen = ImageDraw.Draw(sheet)
    for line in lines:
        pen.text((x, y), line.text, line.color, ImageFont.load_default(line.size))
        y += _line_height(line)
