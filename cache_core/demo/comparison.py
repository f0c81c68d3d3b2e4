"""Methods side by side: what each computed, how long it took and how close its pictures stay to the uncached ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch import Tensor

from ..compare.quality import psnr, ssim
from ..compare.side_by_side import aligned


@dataclass(frozen=True)
class Row:
    """One method's run over all prompts. In a list of rows the first is the uncached one."""

    name: str
    settings: str
    pictures: Tensor  # (prompts, 3, height, width) in 0..1
    computed_share: float  # 0..1 of the uncached run's work
    seconds: float
    speed_up_ideal: float  # if reusing cost nothing

    def psnr(self, reference: "Row") -> float:
        """Median over the prompts, in dB."""
        return median(map(psnr, self.pictures, reference.pictures))

    def ssim(self, reference: "Row") -> float:
        """Median over the prompts."""
        return median(map(ssim, self.pictures, reference.pictures))


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned plain text."""
    header = ("method", "computed", "seconds", "speed-up measured", "ideal", "PSNR dB", "SSIM")
    return aligned([header, *(_cells(row, rows[0]) for row in rows)])


def _cells(row: Row, uncached: Row) -> tuple[str, ...]:
    return (
        f"{row.name} ({row.settings})" if row.settings else row.name,
        f"{row.computed_share:.0%}",
        f"{row.seconds:.2f}",
        f"{uncached.seconds / row.seconds:.2f}x",
        f"{row.speed_up_ideal:.2f}x",
        "-" if row is uncached else f"{row.psnr(uncached):.1f}",
        "-" if row is uncached else f"{row.ssim(uncached):.3f}",
    )


def side_by_side(rows: Sequence[Row], prompts: Sequence[str], path: Path | str, title: str = "") -> None:
    """Draws one PNG for people: a row per method, a column per prompt, the numbers beside the pictures."""
    from ..compare.sheet import Label, draw

    labels = [Label(row.name, row.settings, _summary(row, rows[0])) for row in rows]
    captions = [None, *(Label(settings=prompt) for prompt in prompts)]
    draw(title or _title(rows[0]), [captions, *([label, *row.pictures] for label, row in zip(labels, rows))]).save(path)


def _summary(row: Row, uncached: Row) -> str:
    if row is uncached:
        return f"the reference · {row.seconds:.2f} s"
    likeness = row.psnr(uncached)
    closeness = "identical" if likeness == float("inf") else f"{likeness:.1f} dB"
    return f"{row.computed_share:.0%} computed · {uncached.seconds / row.seconds:.1f}x · {closeness}"


def _title(uncached: Row) -> str:
    count, _, height, width = uncached.pictures.shape
    return f"The same {count} pictures ({width} x {height}), with less computed"
