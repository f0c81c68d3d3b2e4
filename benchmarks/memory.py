"""What each strategy takes of memory at its default settings: measured, and by arithmetic for real models.

    python benchmarks/memory.py [--device cpu|cuda] [--blocks N] [--steps N] [--only TEXT] [--each-step]

Measured is a stack of blocks that allocates what a video model's do (video_blocks.py), by the allocator's own events
(allocations.py): the numbers are exact and the same on every machine. The unit is S, one hidden_states of both branches
in 16 bit. L is the output of each self-attention once: as many S as there are blocks.

The arithmetic is the strategy's own code on tensors without values, in the shapes of real models (memory_shapes.py).
"""

from __future__ import annotations

import argparse
from itertools import groupby

import torch
from memory_shapes import GIB, MODELS, bytes_held_late, bytes_to_hold
from memory_taken import Extra, extra_of

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.strategy import Strategy

STRATEGIES: dict[str, Strategy] = {
    "First Block Cache": FirstBlockCache(),
    **{f"TaylorSeer, {level}": TaylorSeerCache(cache_level=level) for level in ("output", "model", "block", "module")},
    "Pyramid Attention Broadcast": PyramidAttentionBroadcast(),
    "FasterCache": FasterCache(),
    "Pyramid Attention Broadcast, 8 bit": PyramidAttentionBroadcast(cache_dtype="8 bit"),
    "FasterCache, 8 bit": FasterCache(cache_dtype="8 bit"),
}
OUTPUTS = {"Pyramid Attention Broadcast": 1, "FasterCache": 2}  # of each attention that a reused call needs
FEATURES = {"tokens": False, "volumes": True}  # whether they keep the axes frames, height, width


def measured_row(name: str, features: str, extra: Extra) -> list[str]:
    """One line of the first table."""
    copied = sum(extra.copied_unused(OUTPUTS[name])) if name in OUTPUTS else None
    numbers = (extra.peak, extra.learning, max(extra.held), extra.cached.report.bytes_held / extra.unit, copied)
    reused = extra.is_reused()
    return [name, features, *(_number(number) for number in numbers), f"{sum(reused)} of {len(reused)}"]


def steps_held(extra: Extra) -> str:
    """What is held at the end of each step, equal ones together."""
    groups = [(value, len(list(steps))) for value, steps in groupby(_number(held) for held in extra.held)]
    return ", ".join(f"{value} (x{count})" if count > 1 else value for value, count in groups)


def foretold_rows(name: str, strategy: Strategy) -> list[list[str]]:
    """Lines of the second table, in GiB: the most, and where that is less, what is held later on."""
    most, late = ([held(strategy, model) / GIB for model in MODELS] for held in (bytes_to_hold, bytes_held_late))
    rows = {name: most, f"{name}, later on": late} if late < most else {name: most}
    return [[said, *(f"{size:.2f}" for size in sizes)] for said, sizes in rows.items()]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned, and Markdown at the same time."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".replace("-0.00", "0.00")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="only strategies whose name contains this")
    parser.add_argument("--each-step", action="store_true", help="also what is held at the end of each step")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    chosen = {name: each for name, each in STRATEGIES.items() if options.only.lower() in name.lower()}
    extras = {
        (name, features): extra_of(strategy, options.blocks, options.steps, keeps_axes, options.device)
        for features, keeps_axes in FEATURES.items()
        for name, strategy in chosen.items()
    }
    blocks = f"{options.blocks} blocks (L = {options.blocks} S)"
    print(f"{blocks}, {options.steps} steps, device {options.device}, torch {torch.__version__}", end="\n\n")
    head = ["strategy", "features", "peak, S", "first call, S", "held, S", "reported, S", "copied unused, L", "reused"]
    print(table(head, [measured_row(*key, extra) for key, extra in extras.items()]), end="\n\n")
    if options.each_step:
        rows = [[*key, steps_held(extra)] for key, extra in extras.items()]
        print(table(["strategy", "features", "held at the end of each step, S"], rows), end="\n\n")
    print("Held at most, GiB", end="\n\n")
    rows = [["S", *(f"{model.hidden_states / GIB:.3f}" for model in MODELS)]]
    rows += [row for name, strategy in chosen.items() for row in foretold_rows(name, strategy)]
    print(table(["strategy", *(model.name for model in MODELS)], rows))


if __name__ == "__main__":
    main()
