"""Closeness against cost: a column for each shift, a row for each cost, a line for each method, its name beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws without a screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MultipleLocator, PercentFormatter
from quality_results import IDENTICAL, Results
from quality_rows import FEWER_STEPS

CLOSENESS = (18.0, 64.0)  # dB
COST = (0.2, 1.15)
TITLE = """Cached {title} against the uncached ones: closer is higher, cheaper is further left
demo model in {through}, {steps} Euler steps, cfg {cfg:g}, median of {pictures}; each point is a setting"""
FAINT = "Faint points: another setting of the same method is both closer and cheaper."
FEW_TOKENS = "PAB, Pyramid Attention Broadcast, saves inside of blocks: next to nothing with this model's 72 tokens."
EASYCACHE = (
    "EasyCache is handed a clone of its input. As shipped it overwrites the input of a float32 model, and most of its "
    "points would be below this picture."
)
FOOTNOTES = {  # under the picture of which model
    "picture": f"{FAINT} {FEW_TOKENS}\n{EASYCACHE}",
    "video": f"{FAINT}\n{EASYCACHE}",
}
COSTS = {"blocks": "blocks computed", "time": "time taken"}


@dataclass(frozen=True)
class Look:
    """How a method and its variants are drawn, in colours of Okabe and Ito, which the colour-blind can tell apart."""

    method: str
    label: str
    color: str
    marker: str
    width: float = 1.8
    dashes: str = "-"


PointsOf = dict[Look, list[tuple[float, float]]]  # (cost, closeness) of each setting

LOOKS = (
    Look(FEWER_STEPS, "fewer steps,\nno cache", "#000000", "", width=4.5),
    Look("Fewer steps", "fewer steps,\nother samplers", "#000000", "", width=1.5, dashes=":"),
    Look("First Block Cache", "First Block Cache", "#0072B2", "o"),
    Look("TaylorSeer", "TaylorSeer", "#D55E00", "s"),
    Look("TaylorSeer as published", "TaylorSeer\nas published", "#B07800", "s", dashes="--"),
    Look("Pyramid Attention Broadcast", "PAB", "#009E73", "^"),
    Look("FasterCache", "FasterCache", "#B8528F", "D"),
    Look("EasyCache, handed a clone", "EasyCache", "#3D9BD5", "v", dashes="-."),
    Look("LazyCache", "LazyCache", "#777777", "X", dashes=":"),
)


def draw(results: Results, file: Path) -> None:
    """Writes the picture."""
    shifts, made = results.shifts, results.made
    figure, panels = plt.subplots(len(COSTS), len(shifts), figsize=(17, 12.4), sharey=True, squeeze=False)
    figure.subplots_adjust(left=0.045, right=0.99, top=0.9, bottom=0.095, wspace=0.05, hspace=0.22)
    figure.suptitle(TITLE.format(**made), fontsize=15)
    figure.text(0.5, 0.015, FOOTNOTES.get(made["model"], FAINT), fontsize=12, ha="center", color="#333333")
    for line, cost in zip(panels, COSTS):
        line[0].set_ylabel("PSNR to the uncached picture, dB", fontsize=12)
        for panel, shift in zip(line, shifts):
            all_of = {look: _points(results, look, shift, cost) for look in LOOKS}
            points_of = {look: _best(points) for look, points in all_of.items()}
            panel.set(xlim=COST, ylim=CLOSENESS, title=f"flow shift {shift:g}")
            panel.set_xlabel(f"{COSTS[cost]}, of the uncached run", fontsize=12)
            _draw_faint(panel, all_of)
            _draw_lines(panel, points_of)
            _write_names(panel, points_of)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _points(results: Results, look: Look, shift: float, cost: str) -> list[tuple[float, float]]:
    """(cost, closeness) of each setting of a method and its variants that reused anything."""
    own = (result for result in results.of(shift) if _look_of(result.method) is look)
    points = ((result.median(cost), result.median("psnr")) for result in own)
    return [(spent, closeness) for spent, closeness in points if closeness < IDENTICAL]


def _look_of(method: str) -> Look | None:
    """That of the method, or of the one of which this is a variant."""
    fitting = [look for look in LOOKS if f"{method} ".startswith((f"{look.method} ", f"{look.method},"))]
    return max(fitting, key=lambda look: len(look.method), default=None)


def _best(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those than which none is both closer and cheaper, from dear to cheap."""
    kept: list[tuple[float, float]] = []
    for spent, closeness in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or closeness > kept[-1][1]:
            kept.append((spent, closeness))
    return kept[::-1]


def _draw_faint(panel: Axes, all_of: PointsOf) -> None:
    for look, points in all_of.items():
        if points and look.marker:
            panel.plot(*zip(*points), color=look.color, marker=look.marker, linestyle="", alpha=0.3, markersize=5)


def _draw_lines(panel: Axes, points_of: PointsOf) -> None:
    panel.xaxis.set_major_locator(MultipleLocator(0.2))
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.grid(alpha=0.25)
    for look, points in points_of.items():
        if points:
            style = dict(color=look.color, marker=look.marker, linewidth=look.width, linestyle=look.dashes)
            panel.plot(*zip(*points), **style)
    spent, closeness = zip(*sorted(points_of[LOOKS[0]]))
    above = CLOSENESS[1]  # all steps give the uncached picture itself
    panel.fill_between([*spent, 1.0, COST[1]], CLOSENESS[0], [*closeness, above, above], color="#EEEEEE", zorder=0)
    panel.text(0.98, 0.03, "here fewer steps are better", transform=panel.transAxes, ha="right", color="#555555")


def _write_names(panel: Axes, points_of: PointsOf) -> None:
    """Each method's name next to one of its points, where it covers least of the lines and no other name."""
    curves = np.concatenate([_along(panel, points) for points in points_of.values() if points])
    inside, written = panel.get_window_extent(), []
    for look, points in points_of.items():
        best = None
        for text in _candidates(panel, look, points):
            box = text.get_window_extent()
            covered = ((curves > box.min) & (curves < box.max)).all(axis=1).sum()
            clashes = sum(box.overlaps(other) for other in written)
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            badness = covered + 1000 * (clashes + outside)
            if best is None or badness < best[0]:
                if best is not None:
                    best[1].remove()
                best = badness, text, box
            else:
                text.remove()
        if best is not None:
            written.append(best[2])


def _candidates(panel: Axes, look: Look, points: list[tuple[float, float]]) -> Iterator[plt.Annotation]:
    for point in points:
        for across in (-1, 0, 1):
            for up in (-1, 0, 1):
                if across or up:
                    yield panel.annotate(
                        look.label,
                        point,
                        (10 * across, 10 * up),
                        textcoords="offset points",
                        ha={-1: "right", 0: "center", 1: "left"}[across],
                        va={-1: "top", 0: "center", 1: "bottom"}[up],
                        color=look.color,
                        fontsize=12,
                        fontweight="bold",
                        path_effects=[withStroke(linewidth=3, foreground="white")],
                        annotation_clip=False,
                    )


def _along(panel: Axes, points: list[tuple[float, float]]) -> np.ndarray:
    """Many points along a line, and more at its markers, (points, 2) in pixels."""
    ends = panel.transData.transform(points)
    between = [np.linspace(start, end, 60) for start, end in pairwise(ends)]
    return np.concatenate([*[ends] * 10, *between])
