"""Draws the points of a search: how close each run was against what it cost. Needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isfinite

from PIL import Image, ImageDraw, ImageFont

from .found import CLOSENESS, JUDGED, SPEED_UP, Found, Point

FINER = 2  # times as large as it comes out: lines and circles are smooth then
WIDTH, HEIGHT = 900, 600
LEFT, RIGHT, TOP, BOTTOM = 84, 28, 64, 104  # of the frame
PAPER, INK, GREY, LINES = "#1b1d21", "#f1eee8", "#a3a8b0", "#33373f"  # as on the sheets
COLORS = ("#6cb2ff", "#f0d95a", "#c58cf2", "#5fd38d")  # one a strategy
TEXT, SMALL, RADIUS = 19, 15, 7
STEPS_TOLD, CHOSEN = "fewer steps, no cache", "chosen"
DOWN, ACROSS = "dB to the uncached picture: higher is closer", "computed, % of the uncached run: further left is faster"
HOLLOW = "hollow: the seed it searched on; filled: the other"


class _Axes:
    """Where on the picture a share and a closeness are."""

    def __init__(self, levels: Sequence[float]) -> None:
        known = [level for level in levels if isfinite(level)] or [0.0, 50.0]
        self.low, self.high = min(known) // 10 * 10, ceil((max(known) + 1) / 10) * 10

    def at(self, share: float, decibels: float) -> tuple[float, float]:
        """What is not finite, or further than the axes go, is at their end."""
        level = self.high if decibels == float("inf") else max(self.low, min(decibels, self.high))
        level = self.low if level != level else level  # NaN
        across, down = min(share, 1.0), (self.high - level) / (self.high - self.low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)


def plot(found: Found, title: str) -> Image.Image:
    """Every run but the uncached ones, the wish, and a ring around what was chosen."""
    shown = [point for point in found.points if point.how != found.steps]
    wished = CLOSENESS.get(found.wish.name)
    axes = _Axes([point.decibels for point in shown] + ([wished] if wished else []))
    image = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), PAPER)
    pen = ImageDraw.Draw(image)
    _draw_axes(pen, axes, title)
    share = 1 / found.wish.speed_up if found.wish.name == SPEED_UP else None
    ends = [(0.0, wished), (1.0, wished)] if wished else [(share, axes.low), (share, axes.high)]
    pen.line(_finer(*(axes.at(*end) for end in ends)), INK, FINER)
    x, y = axes.at(*ends[1])
    _write(pen, (x, y - 3) if wished else (x + 5, y + 5), f"the wish: {found.wish.told}", "rb" if wished else "lt")
    names = list(dict.fromkeys(map(_name, shown)))
    for point in shown:
        _mark(pen, axes.at(point.share, point.decibels), COLORS[names.index(_name(point)) % 4], point.seed == JUDGED)
    if found.judged:
        x, y = axes.at(found.judged.share, found.judged.decibels)
        ring = (x - 2 * RADIUS, y - 2 * RADIUS), (x + 2 * RADIUS, y + 2 * RADIUS)
        pen.ellipse(_finer(*ring), outline=INK, width=2 * FINER)
        _write(pen, (x + 2 * RADIUS, y - 2 * RADIUS), CHOSEN if found.strategy else "the best, not handed on", "lb")
    _draw_legend(pen, names)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _name(point: Point) -> str:
    return STEPS_TOLD if isinstance(point.how, int) else point.how.title


def _draw_axes(pen: ImageDraw.ImageDraw, axes: _Axes, title: str) -> None:
    for percent in range(0, 101, 20):
        ends = [axes.at(percent / 100, axes.low), axes.at(percent / 100, axes.high)]
        pen.line(_finer(*ends), LINES, FINER)
        _write(pen, (ends[0][0], ends[0][1] + 6), f"{percent}", "mt", GREY)
    for level in range(int(axes.low), int(axes.high) + 1, 10):
        ends = [axes.at(0.0, level), axes.at(1.0, level)]
        pen.line(_finer(*ends), LINES, FINER)
        _write(pen, (ends[0][0] - 8, ends[0][1]), f"{level}", "rm", GREY)
    _write(pen, (LEFT, 10), title, "lt", INK, TEXT)
    _write(pen, (LEFT, 38), DOWN, "lt", GREY)
    _write(pen, (WIDTH - RIGHT, HEIGHT - BOTTOM + 28), ACROSS, "rt", GREY)


def _draw_legend(pen: ImageDraw.ImageDraw, names: Sequence[str]) -> None:
    left, line = LEFT, HEIGHT - 30
    for name, color in zip(names, COLORS):
        _mark(pen, (left + RADIUS, line), color, True)
        _write(pen, (left + 3 * RADIUS, line), name, "lm")
        left += 5 * RADIUS + ImageFont.load_default(SMALL).getlength(name)
    _write(pen, (left, line), HOLLOW, "lm", GREY)


def _mark(pen: ImageDraw.ImageDraw, at: tuple[float, float], color: str, is_filled: bool) -> None:
    (x, y), filled = at, color if is_filled else PAPER
    pen.ellipse(_finer((x - RADIUS, y - RADIUS), (x + RADIUS, y + RADIUS)), filled, color, 2 * FINER)


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, anchor: str, color: str = INK, size: int = SMALL
) -> None:
    """Words that stay inside: those that would leave on the right end at the edge."""
    font = ImageFont.load_default(size * FINER)
    x, y = _finer(at)[0]
    if anchor[0] == "l":
        x = min(x, WIDTH * FINER - font.getlength(text) - 6 * FINER)
    pen.text((x, y), text, color, font, anchor=anchor)


def _finer(*points: tuple[float, float]) -> list[tuple[float, float]]:
    return [(x * FINER, y * FINER) for x, y in points]
