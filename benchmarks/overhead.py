"""What caching itself costs, and how much of the speed-up that a strategy could give it gives.

    python benchmarks/overhead.py [--device cpu|cuda] [--shape small|flux|wan] [--repeats N] [--json FILE] [--check]

with ComfyUI's Python. The model is ComfyUI's own class with random weights, sampled by `comfy.sample.sample`.

How noise is kept out: within one cached sampling run every model call is made twice, with the cache and without, one
right after the other in alternating order, from ComfyUI's APPLY_MODEL wrapper. So each cached call is compared with a
plain call that had the same inputs and, within seconds, the same machine; slow drift cancels in the ratio of the two, and
a burst that hits one of them is dropped by the median of that step's ratios over the repeats. Whole runs, one after the
other, would be compared across minutes. The time of a sampling run is then the plain calls' median times the sum of the
ratios, plus what the run spends outside the model, which is the same for both. CPU time is taken beside wall time: where
other work takes the cores away, CPU time does not count that. The wall (on CUDA: the device's events) is what `value` is
made of, because waiting is a cost too; the same value from CPU time is printed next to it.

`own ms` is measured without that noise: the blocks are replaced by ones that do nearly nothing to tensors of full size, so
that the cached call minus the plain one is what the cache itself does in a computed call, and little else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads would count as CPU time

from random_models import SHAPES, TINY, Shape, load, start_comfyui

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from cache_core.report import Report
    from cache_core.strategy import Strategy

EMPTY_RUNS = 3  # of 20 steps; each call takes milliseconds
SHORT = 8  # steps of a run that reuses nothing: every call is one more pair, and none differs from the others


class Amount(NamedTuple):
    """What one call took: seconds, or whatever the meter counts."""

    value: float
    cpu: float = 0.0


Meter = Callable[[Callable[[], Any]], tuple[Any, Amount]]  # runs the call; what it returned, and what it took


def wall(call: Callable[[], Any]) -> tuple[Any, Amount]:
    """Seconds on the clock and on the cores."""
    began, cpu_began = time.perf_counter(), time.process_time()
    output = call()
    return output, Amount(time.perf_counter() - began, time.process_time() - cpu_began)


def device_events(call: Callable[[], Any]) -> tuple[Any, Amount]:
    """Seconds between two CUDA events on an idle device: the launching of the kernels counts as well."""
    import torch

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cpu_began = time.process_time()
    began.record()
    output = call()
    ended.record()
    torch.cuda.synchronize()
    return output, Amount(began.elapsed_time(ended) / 1000, time.process_time() - cpu_began)


def device_peak(call: Callable[[], Any]) -> tuple[Any, Amount]:
    """The most bytes allocated on the device at any time of the call."""
    import torch

    if not torch.cuda.is_available():
        return call(), Amount(float("nan"))
    torch.cuda.reset_peak_memory_stats()
    return call(), Amount(torch.cuda.max_memory_allocated())


def host_reads(call: Callable[[], Any]) -> tuple[Any, Amount]:
    """How often the host reads a tensor's value, which on CUDA waits for the device."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    reads = []

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            name = function.overloadpacket
            copied_from = {torch.ops.aten._to_copy: 0, torch.ops.aten.copy_: 1}.get(name)
            reached_host = copied_from is not None and args[copied_from].is_cuda and not output.is_cuda
            if reached_host or name in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                reads.append(str(name))
            return output

    class Called(TorchFunctionMode):  # on the CPU `tolist` copies nothing, so that the other mode would not see it
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.tolist and not args[0].is_cuda:
                reads.append("tolist")
            return function(*args, **(kwargs or {}))

    with Called(), Dispatched():
        output = call()
    return output, Amount(len(reads))


class SideBySide:
    """An APPLY_MODEL wrapper around the cache's own: makes every model call twice, with the cache and without."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.plain: list[Amount] = []
        self.cached: list[Amount] = []

    def __call__(
        self, executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: dict = {}, **conds: Any,
    ) -> Any:  # fmt: skip
        from cache_core.adapters.comfyui.wrappers import KEY

        without = {name: value for name, value in transformer_options.items() if name != KEY}
        both = [(self.plain, without), (self.cached, transformer_options)]
        outputs = {}
        for taken, options in both if len(self.plain) % 2 else reversed(both):
            outputs[id(taken)], amount = self.meter(
                lambda options=options: executor(x, t, c_concat, c_crossattn, control, options, **conds)
            )
            taken.append(amount)
        return outputs[id(self.cached)]


@dataclass
class Run:
    """One sampling run, each call made both ways."""

    plain: list[Amount]
    cached: list[Amount]
    outside: Amount  # what the run spent outside the model
    report: Report

    def ratios(self, clock: str = "value") -> list[float]:
        """Cached over plain, call by call."""
        return [getattr(cached, clock) / getattr(plain, clock) for plain, cached in zip(self.plain, self.cached)]


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
    low: float  # quartiles of the repeats' own values
    high: float
    value_cpu_time: float
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


class Sampling:
    """A model with noise and a prompt, ready to be sampled with any strategy."""

    def __init__(self, shape: Shape, device: str) -> None:
        import torch

        self.model, self.shape = load(shape, device)
        self.device, generator = device, torch.Generator().manual_seed(1)
        self.noise = torch.randn(shape.latent, generator=generator)
        extra = {"guidance": 3.5}
        if shape.pooled:
            extra["pooled_output"] = torch.randn(1, shape.pooled, generator=generator)
        self.prompt = [[torch.randn(1, *shape.text, generator=generator), extra]]

    @property
    def clock(self) -> Meter:
        return wall if self.device == "cpu" else device_events

    def run(self, strategy: Strategy, steps: int, meter: Meter) -> Run:
        """Sample once."""
        import comfy.sample
        import torch
        from comfy.patcher_extension import WrappersMP

        from cache_core.adapters.comfyui.wrappers import with_cache

        pairs, reports = SideBySide(meter), []
        model = self.model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark", pairs)  # first in, so outside the cache's
        model = with_cache(model, strategy, lambda report, latent: reports.append(report))
        sample = lambda: comfy.sample.sample(  # noqa: E731
            model, self.noise, steps, 1.0, "euler", "simple", self.prompt, self.prompt, torch.zeros_like(self.noise),
            disable_pbar=True, seed=1,
        )  # fmt: skip
        latent, whole = wall(sample)
        if not latent.isfinite().all():
            raise RuntimeError("The random model's latent is not finite. Its times would not be a trained model's.")
        both = [*pairs.plain, *pairs.cached]
        outside = Amount(whole.value - sum(a.value for a in both), whole.cpu - sum(a.cpu for a in both))
        return Run(pairs.plain, pairs.cached, outside, reports[0])

    @contextmanager
    def empty_blocks(self) -> Iterator[None]:
        """Inside the `with`, blocks hand on their streams, a little larger."""
        from torch import nn

        from cache_core.hooks import HookRegistry

        def barely(forward: Any, *args: Any, **kwargs: Any) -> Any:
            image = args[0] if args else kwargs["img"]
            return (image * 1.001, kwargs["txt"] * 1.001) if "txt" in kwargs else image * 1.001

        hooks = HookRegistry()
        for blocks in self.model.model.diffusion_model.children():
            for block in blocks if isinstance(blocks, nn.ModuleList) else ():
                hooks.add(block, barely)
        with hooks:
            yield


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


def summary(case: Case, runs: list[Run]) -> Row:
    """The row of a case, from its timed runs."""
    report = runs[0].report
    actions = {name: report.count(name) for name in ("computed", "reused", "forecast") if report.count(name)}
    if case.reuses != (report.count("reused", "forecast") > 0):
        raise RuntimeError(f"{case.name}: expected it to {'' if case.reuses else 'not '}reuse, but it did: {actions}")
    if any([call.action for call in run.report.calls] != [call.action for call in report.calls] for run in runs):
        raise RuntimeError(f"{case.name}: the repeats reused at different steps, so they can't be compared")
    own_values = [_value(case, [run]) for run in runs]
    low, _, high = quantiles(own_values, n=4, method="inclusive") if len(runs) > 1 else own_values * 3
    value = _value(case, runs)
    computed = [call.action == "computed" for call in report.calls]
    row = Row(
        case=case.name,
        measure="share of ideal" if case.reuses else "extra time",
        value=value,
        low=low,
        high=high,
        value_cpu_time=_value(case, runs, "cpu"),
        target=case.target,
        met=_met(case, value, low, high),
        speed_up=_speed_up(runs),
        ideal=1 / report.computed_share,
        plain_ms=1000 * median(amount.value for run in runs for amount in run.plain),
        computed_ms=1000 * median(a.value for run in runs for a, is_computed in zip(run.cached, computed) if is_computed),
        reused_ms=None,
        held_mib=report.bytes_held / 2**20,
        actions=actions,
    )
    if case.reuses:
        row.reused_ms = 1000 * median(a.value for run in runs for a, is_computed in zip(run.cached, computed) if not is_computed)
    return row


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
    """Whether the target is met; "noise" if not, but a quarter of the repeats meet it."""
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
            count = steps if case.reuses else min(steps, SHORT)
            runs[case.name].append(sampling.run(case.strategy, count, sampling.clock))
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
            extra = [c.value - p.value for run in runs for p, c in list(zip(run.plain, run.cached))[1:]]
            row.own_ms = 1000 * median(extra)
        reads = sampling.run(case.strategy, steps, host_reads)
        row.reads_per_call = sum(amount.value for amount in reads.cached[1:]) / (steps - 1)
        row.plain_reads_per_call = sum(amount.value for amount in reads.plain[1:]) / (steps - 1)
    if sampling.device != "cpu":
        peaks = sampling.run(case.strategy, min(steps, SHORT), device_peak)
        row.peak_mib = max(amount.value for amount in peaks.cached) / 2**20
        row.plain_peak_mib = (min(amount.value for amount in peaks.plain)) / 2**20


COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row.case,
    "measure": lambda row: row.measure,
    "value": lambda row: f"{row.value:.2f} %",
    "quartiles": lambda row: f"{row.low:.2f} to {row.high:.2f}",
    "by CPU time": lambda row: f"{row.value_cpu_time:.2f} %",
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
    parser.add_argument("--steps", type=int, default=20, help="of a run that reuses; others have at most %d" % SHORT)
    parser.add_argument("--repeats", type=int, default=5, help="sampling runs of each case")
    parser.add_argument("--threads", type=int, help="of the CPU; default: as PyTorch chooses")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="shrink the shape: tests the benchmark, its times mean nothing")
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
