"""Cards that stand for workflows in the template browser where there is no picture to show: drawn, not generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

ICON = Path(__file__).resolve().parents[1] / "docs" / "brand" / "icon.png"
SIZE, MARGIN = 512, 40
GROUND, PAPER, GREY, ACCENT = "#1a1829", "#f6f1e7", "#a9a4b8", "#d55e00"


def card(note: dict[str, Any]) -> Image.Image:
    """The title and what it is set to, under the icon."""
    sheet = Image.new("RGB", (SIZE, SIZE), GROUND)
    pen = ImageDraw.Draw(sheet)
    with Image.open(ICON) as icon:
        small = icon.convert("RGBA").resize((132, 132), Image.Resampling.LANCZOS)
    sheet.paste(small, (MARGIN, MARGIN), small)
    y = _write(pen, note["title"], 40, PAPER, 214)
    pen.rectangle((MARGIN, y + 12, MARGIN + 64, y + 17), ACCENT)
    _write(pen, note["subtitle"], 24, GREY, y + 34)
    pen.text((MARGIN, SIZE - MARGIN - 18), "needs its model files; no picture yet", GREY, ImageFont.load_default(18))
    return sheet


def _write(pen: ImageDraw.ImageDraw, text: str, size: int, color: str, y: int) -> int:
    """Write it within the margins from y on, and return where it ends."""
    font, line = ImageFont.load_default(size), ""
    for word in [*text.split(), None]:
        longer = f"{line} {word}" if line else word
        if word is not None and font.getlength(longer) <= SIZE - 2 * MARGIN:
            line = longer
            continue
        pen.text((MARGIN, y), line, color, font)
        y, line = y + size * 5 // 4, word or ""
    return y
