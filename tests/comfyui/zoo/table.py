"""docs/models.md: what the zoo run found and measured, one row for each architecture."""

from __future__ import annotations

from dataclasses import dataclass

from .architecture import Architecture

HEAD = """# Supported models

Every diffusion transformer of ComfyUI 0.33.0, from the run of `tests/comfyui/test_zoo.py` (`--write-models` writes this
page): tiny models with random weights, built by ComfyUI's own code. For each, that run proves that settings which
are off change nothing, that reuse happens, that a replayed step is the computed one, and that nothing stays behind.

*Blocks* are the lists that First Block Cache and TaylorSeer's levels `model`, `block` and `module` cache; the first
leads. *Attention* is what Pyramid Attention Broadcast and FasterCache cache. The last four columns say how much of the
floating-point work each strategy left out over 8 steps from a denoise of 0.1 at cfg 3, with settings far too fast for
pictures: they show that it works, not what it gains. TaylorSeer is at its default level, the model's output.

| model | blocks | attention | First Block Cache | TaylorSeer | Pyramid Attention | FasterCache | notes |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One architecture and the share of floating-point work that each strategy left out."""

    architecture: Architecture
    skipped: dict[str, float]

    @property
    def facts(self) -> tuple[str, str, str]:
        """What of it does not depend on the machine: blocks, attention, notes."""
        architecture = self.architecture
        blocks = " + ".join(f"`{name}`" for name in architecture.chains) or "none"
        return blocks, ", ".join(architecture.attention) or "none", architecture.note

    def __str__(self) -> str:
        blocks, attention, note = self.facts
        shares = [f"{100 * max(share, 0):.0f}%" if share > 0.005 else "-" for share in self.skipped.values()]
        return "| " + " | ".join([self.architecture.name, blocks, attention, *shares, note]) + " |"


def written(rows: list[Row], page: str) -> str:
    """The page, and what follows the table in it as it is."""
    _, heading, rest = page.partition("\n## ")
    return HEAD + "".join(f"{row}\n" for row in rows) + heading + rest


def rows_in(page: str) -> dict[str, tuple[str, str, str]]:
    """What a page says of each model: blocks, attention, notes."""
    cells = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "
    ]
    return {row[0]: (row[1], row[2], row[-1]) for row in cells if row[0] != "model"}
