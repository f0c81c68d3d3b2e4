"""Draws a sheet of pictures with labels at the left, captions above and a title."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_PAPER, _INK, _GREY = "#faf9f6", "#1f2328", "#6a7079"
_MARGIN, _GAP = 32, 12
_SMALLEST_PICTURE = 144  # pixels: below this a person leans forward
_LABEL_WIDTH = 260
_TITLE_SIZE, _NAME_SIZE, _TEXT_SIZE = 28, 20, 15


class Label(NamedTuple):
    """The words at the left of a row, top to bottom."""

    name: str
    settings: str
    summary: str


class _Line(NamedTuple):
    text: str
    size: int
    color: str


def draw(title: str, labels: Sequence[Label], captions: Sequence[str], rows: Sequence[Tensor]) -> Image.Image:
    """The sheet. Each row is (pictures, 3, height, width) in 0..1 and has a picture for each caption."""
    enlargement = -(-_SMALLEST_PICTURE // min(rows[0].shape[-2:]))
    height, width = (enlargement * pixels for pixels in rows[0].shape[-2:])
    caption_lines = [_wrapped(caption, _TEXT_SIZE, _GREY, width) for caption in captions]
    label_lines = [_label_lines(label) for label in labels]

    row_step = max(height, *map(_height, label_lines)) + _GAP
    column_step = width + _GAP
    left = _MARGIN + _LABEL_WIDTH + _GAP
    right = left + len(captions) * column_step - _GAP
    title_lines = _wrapped(title, _TITLE_SIZE, _INK, right - _MARGIN)
    top = _MARGIN + _height(title_lines) + _GAP + max(map(_height, caption_lines)) + _GAP
    bottom = top + len(rows) * row_step - _GAP
    sheet = Image.new("RGB", (right + _MARGIN, bottom + _MARGIN), _PAPER)

    pen = ImageDraw.Draw(sheet)
    _write(pen, _MARGIN, _MARGIN, title_lines)
    for column, lines in enumerate(caption_lines):
        _write(pen, left + column * column_step, top - _GAP - _height(lines), lines)
    for index, (lines, pictures) in enumerate(zip(label_lines, rows, strict=True)):
        y = top + index * row_step
        _write(pen, _MARGIN, y + (height - _height(lines)) // 2, lines)
        for column, picture in enumerate(pictures):
            enlarged = to_image(picture).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(enlarged, (left + column * column_step, y))
    return sheet


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, height, width) in 0..1 as a Pillow image."""
    levels = (picture.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _label_lines(label: Label) -> list[_Line]:
    return [
        *_wrapped(label.name, _NAME_SIZE, _INK, _LABEL_WIDTH),
        *_wrapped(label.settings, _TEXT_SIZE, _GREY, _LABEL_WIDTH),
        *_wrapped(label.summary, _TEXT_SIZE, _INK, _LABEL_WIDTH),
    ]


def _wrapped(text: str, size: int, color: str, width: int) -> list[_Line]:
    font = ImageFont.load_default(size)
    texts: list[str] = []
    for word in text.split():
        longer = f"{texts[-1]} {word}" if texts else word
        if texts and font.getlength(longer) <= width:
            texts[-1] = longer
        else:
            texts.append(word)
    return [_Line(line, size, color) for line in texts]


def _height(lines: Sequence[_Line]) -> int:
    return sum(map(_line_height, lines))


def _line_height(line: _Line) -> int:
    return line.size * 7 // 5  # 1.4: airy, but lines of one label still belong together


def _write(pen: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[_Line]) -> None:
    for line in lines:
        pen.text((x, y), line.text, line.color, ImageFont.load_default(line.size))
        y += _line_height(line)
