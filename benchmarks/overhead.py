"""What caching itself costs, and how much of the speed-up that a strategy could give it gives.

    python benchmarks/overhead.py [--device cpu|cuda] [--shape small|flux|wan] [--repeats N] [--json FILE] [--check]

with ComfyUI's Python. The model is ComfyUI's own class with random weights, sampled by `comfy.sample.sample`.

How noise is kept out: within one cached sampling run every model call is made twice, with the cache and without, one
right after the other in alternating order, from ComfyUI's APPLY_MODEL wrapper. So each cached call is compared with a
plain call that had the same inputs and, within seconds, the same machine: slow drift cancels in the ratio of the two,
and a burst that hits one of them is dropped by the median of that step's ratios over the repeats. Whole runs, one after
the other, would be compared across minutes. The time of a cached run is then the median of the plain calls times the
sum of the ratios, plus what the run spends outside the model, which is the same for both.

On the CPU it is CPU time (`time.process_time`) that decides: it does not count the moments in which other work has the
cores, and the cache waits for nothing there. The same value by the wall clock is printed next to it. On CUDA it is
events on the device that decide; each call starts on an idle device, so that launching kernels counts as well.

`own ms` is measured without the noise of large numbers: the blocks are replaced by ones that do nearly nothing to
tensors of full size, so that the cached call minus the plain one is what the cache itself does in a computed call.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads would count as CPU time

from random_models import SHAPES, TINY, start_comfyui
from side_by_side import Run, Sampling, device_peak, host_reads

if TYPE_CHECKING:
    from cache_core.strategy.strategy import Strategy

EMPTY_RUNS = 3  # of 20 steps; each call takes milliseconds
DRAWS = 200  # of repeats: their quartiles no longer change in the digits printed
SHORT = 8  # steps of a run that reuses nothing: every call is one more pair, and none differs from the others


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    strategy: Strategy
    target: float
    reuses: bool


@dataclass
class Row:
    """What was measured of a case. Percent, milliseconds and MiB."""

    case: str
    measure: str  # "extra time" of a call that reuses nothing, or "share of ideal"
    value: float
    low: float  # quartiles of the value over random draws of the repeats, with replacement
    high: float
    value_wall: float
    target: float
    met: str
    speed_up: float
    ideal: float
    plain_ms: float
    computed_ms: float
    reused_ms: float | None
    own_ms: float | None = None
    reads_per_call: float | None = None
    plain_reads_per_call: float | None = None
    held_mib: float = 0.0
    peak_mib: float | None = None
    plain_peak_mib: float | None = None
    actions: dict[str, int] = field(default_factory=dict)


def cases(steps: int) -> list[Case]:
    """What is measured, with its target in percent."""
    from cache_core.strategies.first_block import FirstBlockCache
    from cache_core.strategies.taylorseer import TaylorSeerCache

    def forecast(level: str, **settings: Any) -> TaylorSeerCache:
        return TaylorSeerCache(cache_level=level, **settings)

    return [
        Case("First Block Cache, threshold 1e-9", FirstBlockCache(residual_diff_threshold=1e-9), 1.0, False),
        Case("TaylorSeer output, no forecast", forecast("output", disable_cache_before_step=steps), 1.0, False),
        Case("TaylorSeer model, no forecast", forecast("model", disable_cache_before_step=steps), 1.0, False),
        Case("TaylorSeer output, interval 4", forecast("output", cache_interval=4), 98.0, True),
        Case("TaylorSeer model, interval 4", forecast("model", cache_interval=4), 95.0, True),
        Case(
            "First Block Cache, every other step",  # a threshold that everything passes, and one reuse in a row
            FirstBlockCache(residual_diff_threshold=1.0, max_consecutive_cache_hits=1),
            90.0,
            True,
        ),
    ]


def actions(run: Run) -> dict[str, int]:
    """How many model calls were computed, reused and forecast."""
    return dict(Counter(call.action for call in run.report.calls))


def summary(case: Case, runs: list[Run]) -> Row:
    """The row of a case, from its timed runs."""
    report = runs[0].report
    draw = random.Random(0)
    low, _, high = quantiles((_value(case, draw.choices(runs, k=len(runs))) for _ in range(DRAWS)), n=4)
    value = _value(case, runs)
    computed, others = [], []
    for run in runs:
        for call, amount in zip(run.report.calls, run.cached):
            (computed if call.action == "computed" else others).append(1000 * amount.wall)
    return Row(
        case=case.name,
        measure="share of ideal" if case.reuses else "extra time",
        value=value,
        low=low,
        high=high,
        value_wall=_value(case, runs, "wall"),
        target=case.target,
        met=_met(case, value, low, high),
        speed_up=_speed_up(runs),
        ideal=1 / report.computed_share,
        plain_ms=1000 * median(amount.wall for run in runs for amount in run.plain),
        computed_ms=median(computed),
        reused_ms=median(others) if others else None,
        held_mib=report.bytes_held / 2**20,
        actions=actions(runs[0]),
    )


def _value(case: Case, runs: list[Run], clock: str = "value") -> float:
    if case.reuses:
        return 100 * _speed_up(runs, clock) * runs[0].report.computed_share
    after_learning = [ratio for run in runs for ratio in run.ratios(clock)[1:]]
    return 100 * (median(after_learning) - 1)


def _speed_up(runs: list[Run], clock: str = "value") -> float:
    """Of the whole sampling run: seconds without the cache over seconds with it. See this module's text."""
    plain = median(getattr(amount, clock) for run in runs for amount in run.plain)
    outside = median(getattr(run.outside, clock) for run in runs) / plain
    ratios = [median(of_this_step) for of_this_step in zip(*(run.ratios(clock) for run in runs))]
    return (len(ratios) + outside) / (sum(ratios) + outside)


def _met(case: Case, value: float, low: float, high: float) -> str:
    """Whether the target is met; "noise" if not, but a quarter of the draws meet it."""
    better, is_met = (high, value >= case.target) if case.reuses else (low, value <= case.target)
    if is_met:
        return "yes"
    return "noise" if (better >= case.target if case.reuses else better <= case.target) else "no"


def measure(sampling: Sampling, chosen: list[Case], steps: int, repeats: int) -> list[Row]:
    """Every case, in turns: first, last, and first again, so that none has the machine at its best."""
    tell("warming up")
    sampling.run(chosen[0].strategy, 2, sampling.clock)
    runs: dict[str, list[Run]] = {case.name: [] for case in chosen}
    for repeat in range(repeats):
        for case in chosen if repeat % 2 == 0 else reversed(chosen):
            tell(f"repeat {repeat + 1} of {repeats}: {case.name}")
            run = sampling.run(case.strategy, steps if case.reuses else min(steps, SHORT), sampling.clock)
            if case.reuses != (set(actions(run)) != {"computed"}):
                raise RuntimeError(
                    f"{case.name}: its model calls were {actions(run)}. Is its strategy set as its name says?"
                )
            if runs[case.name] and actions(run) != actions(runs[case.name][0]):
                tell(f"{case.name}: {actions(run)}, in the first repeat {actions(runs[case.name][0])}")
            runs[case.name].append(run)
    rows = [summary(case, runs[case.name]) for case in chosen]
    tell("empty blocks, host reads, memory")
    for case, row in zip(chosen, rows):
        look_closer(sampling, case, row, steps)
    return rows


def look_closer(sampling: Sampling, case: Case, row: Row, steps: int) -> None:
    """What needs runs of its own, and no repeats."""
    with sampling.empty_blocks():
        if not case.reuses:
            runs = [sampling.run(case.strategy, steps, sampling.clock) for _ in range(EMPTY_RUNS)]
            extra = [cached.wall - plain.wall for run in runs for plain, cached in list(zip(run.plain, run.cached))[1:]]
            row.own_ms = 1000 * median(extra)
        reads = sampling.run(case.strategy, steps, host_reads)
        row.reads_per_call = sum(amount.value for amount in reads.cached[1:]) / (steps - 1)
        row.plain_reads_per_call = sum(amount.value for amount in reads.plain[1:]) / (steps - 1)
    if sampling.device != "cpu":
        peaks = sampling.run(case.strategy, min(steps, SHORT), device_peak)
        row.peak_mib = max(amount.value for amount in peaks.cached) / 2**20
        row.plain_peak_mib = peaks.plain[0].value / 2**20  # the very first call: nothing is kept yet


COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row.case,
    "measure": lambda row: row.measure,
    "value": lambda row: f"{row.value:.2f} %",
    "quartiles": lambda row: f"{row.low:.2f} to {row.high:.2f}",
    "by the wall": lambda row: f"{row.value_wall:.2f} %",
    "target": lambda row: f"{'at least' if row.measure == 'share of ideal' else 'at most'} {row.target:g} %",
    "met": lambda row: row.met,
    "speed-up": lambda row: f"{row.speed_up:.2f}x of {row.ideal:.2f}x" if row.reused_ms is not None else "",
    "plain ms": lambda row: f"{row.plain_ms:.1f}",
    "computed ms": lambda row: f"{row.computed_ms:.1f}",
    "reused ms": lambda row: _number(row.reused_ms, 2),
    "own ms": lambda row: _number(row.own_ms, 2),
    "reads/call": lambda row: f"{_number(row.reads_per_call, 1)} ({_number(row.plain_reads_per_call, 1)})",
    "held MiB": lambda row: f"{row.held_mib:.1f}",
    "peak MiB": lambda row: f"{_number(row.peak_mib, 0)} ({_number(row.plain_peak_mib, 0)})" if row.peak_mib else "",
}


def table(rows: list[Row]) -> str:
    """Aligned, and Markdown at the same time."""
    lines = [list(COLUMNS), *([show(row) for show in COLUMNS.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    shown = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def tell(text: str) -> None:
    """Progress, kept apart from the table."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: small on the CPU, flux on CUDA")
    parser.add_argument("--steps", type=int, default=20, help=f"of a run that reuses; others have {SHORT} at most")
    parser.add_argument("--repeats", type=int, default=3, help="sampling runs of each case")
    parser.add_argument("--threads", type=int, help="of the CPU; default: as PyTorch chooses")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="shrink the shape; the times mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed by more than the noise")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    start_comfyui(options.device)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    wanted = options.shape or ("small" if options.device == "cpu" else "flux")
    sampling = Sampling((TINY if options.tiny else SHAPES)[wanted], options.device)
    chosen = [case for case in cases(options.steps) if options.only.lower() in case.name.lower()]
    rows = measure(sampling, chosen, options.steps, options.repeats)
    setting = {
        "shape": sampling.shape.name + (" (tiny)" if options.tiny else ""),
        "blocks": f"{sampling.shape.blocks} of {(TINY if options.tiny else SHAPES)[wanted].blocks}",
        "tokens": sampling.shape.tokens,
        "dtype": str(sampling.model.model.diffusion_model.dtype).removeprefix("torch."),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "repeats": options.repeats,
        "torch": torch.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items()), table(rows), sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps({"setting": setting, "rows": [asdict(row) for row in rows]}, indent=1))
    return int(options.check and any(row.met == "no" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
