"""Every diffusion transformer that ComfyUI has, with every strategy: the same promises for all.

`-k Qwen` cuts it to one architecture. `--write-models` writes docs/models.md from what was measured.
"""

from __future__ import annotations

import gc
import inspect
import re
import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zoo import all_architectures
from zoo.additions import of_blocks
from zoo.architecture import is_older
from zoo.table import Row, rows_in, written
from zoo.wan import frame_by_frame

from cache_core.run.run import CacheRun
from cache_core.strategies import all_strategies
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.forecast import History
from cache_core.strategy.strategy import COMPUTE, FIRST_BLOCK, Strategy

MODELS = Path(__file__).parents[2] / "docs" / "models.md"
STEPS = 8
ALWAYS = dict(spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=1001)
OFF = [
    FirstBlockCache(residual_diff_threshold=0.0),
    TaylorSeerCache(cache_interval=1),
    PyramidAttentionBroadcast(spatial_attention_block_skip_range=1),
    FasterCache(spatial_attention_block_skip_range=1, unconditional_batch_skip_range=1),
]
NEVER_MET = FirstBlockCache(residual_diff_threshold=1e-9)  # everything is measured and kept, nothing reused
AGGRESSIVE = [
    FirstBlockCache(residual_diff_threshold=1.0),
    TaylorSeerCache(cache_interval=4, disable_cache_before_step=1),
    PyramidAttentionBroadcast(
        spatial_attention_block_skip_range=4,
        cross_attention_block_skip_range=4,
        cross_attention_timestep_skip_start=-1,
        cross_attention_timestep_skip_end=1001,
        **ALWAYS,
    ),
    FasterCache(unconditional_batch_timestep_skip_end=1001, **ALWAYS),
]
WITH_ATTENTION = (PyramidAttentionBroadcast, FasterCache)
NO_DENOISERS = {  # files whose models ComfyUI loads by the same classes, but that draw nothing by steps
    "rt_detr/rtdetr_v4.py": "finds objects",
    "depth_anything_3/model.py": "estimates depth",
    "sam3/detector.py": "segments",
}
by_title = pytest.mark.parametrize("strategy", AGGRESSIVE, ids=lambda strategy: type(strategy).__name__)


def params():
    return [
        pytest.param(
            architecture,
            id=architecture.name,
            marks=[pytest.mark.xdist_group(architecture.name), *[pytest.mark.slow] * architecture.is_slow],
        )
        for architecture in all_architectures()
    ]


@dataclass
class Sampled:
    """One sampling run and what was seen of it."""

    latent: Any
    report: Any
    blocks: Counter  # runs of each block, by name, counted in the blocks' own classes
    flops: int
    start: Any  # the latent that sampling began with
    held: list[weakref.ref] = field(default_factory=list)  # tensors that the cache held when it ended


class Specimen:
    """A model of one architecture, and its sampling runs, each done once."""

    def __init__(self, architecture: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        self.architecture, self.dtype = architecture, dtype
        self.model = architecture.build(dtype)
        self.network = self.model.model.diffusion_model
        self.blocks: Counter = Counter()
        self._count_blocks(monkeypatch)
        self.sampled = cache(self._sampled)
        self.sampled(None)  # ComfyUI leaves marks of its own when it loads a model
        self.before = self.traces()

    def traces(self) -> list[set[str]]:
        """What each module's instance carries."""
        return [set(vars(module)) for module in self.network.modules()]

    def _count_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from cache_core.adapters.comfyui.exceptions import METHODS

        lists = {name: self.network.get_submodule(name) for name in self.architecture.chains}
        names = {id(block): f"{name}.{key}" for name, blocks in lists.items() for key, block in blocks.named_children()}
        for block_class in {type(block) for blocks in lists.values() for block in blocks.children()}:
            method = METHODS.get(block_class.__name__, "forward")
            own = getattr(block_class, method)

            def run(block, *args, _own=own, **kwargs):
                if id(block) in names:
                    self.blocks[names[id(block)]] += 1
                return _own(block, *args, **kwargs)

            monkeypatch.setattr(block_class, method, run)

    def _sampled(
        self, strategy: Strategy | None, cfg: float = 3.0, denoise: float = 1.0, steps: int = STEPS
    ) -> Sampled:
        from cache_core.adapters.comfyui import with_cache

        reports, held, own, model = [], [], CacheRun.free, self.model
        if strategy is not None:
            model = with_cache(self.model, strategy, on_report=lambda report, _: reports.append(report))

        def free(run: CacheRun) -> None:
            held.extend(map(weakref.ref, tensors_in([memory.state for memory in run.state.memories.values()])))
            own(run)

        start = self.architecture.start(denoise)
        self.blocks.clear()
        with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counting:
            patch.setattr(CacheRun, "free", free)
            try:
                latent = self.architecture.sample(model, start, steps, cfg, denoise)
            except (RuntimeError, ValueError) as error:
                if strategy is not None or not is_older():
                    raise
                pytest.skip(f"this ComfyUI can't sample it so without a cache ({error})")
        report = reports[0] if reports else None
        return Sampled(latent, report, Counter(self.blocks), counting.get_total_flops(), start, held)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors that a state holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = list(value) if isinstance(value, (list, tuple)) else list(getattr(value, "__dict__", {}).values())
    return [tensor for item in inside for tensor in tensors_in(item)]


def parts(latent: Any) -> list[torch.Tensor]:
    return list(latent.unbind()) if getattr(latent, "is_nested", False) else [latent]


def equal(some: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(parts(some), parts(other), strict=True))


def specimen_of(architecture, dtype):
    if not architecture.is_here:
        pytest.skip("this ComfyUI does not have it")
    with pytest.MonkeyPatch.context() as patch:
        try:
            found = Specimen(architecture, dtype, patch)
        except TypeError as error:
            if not is_older():
                raise
            pytest.skip(f"this ComfyUI has it with other settings ({error})")
        yield found
    gc.collect()


@pytest.fixture(scope="module", params=params())
def specimen(request, comfy):
    yield from specimen_of(request.param, torch.float32)


@pytest.mark.parametrize("strategy", OFF, ids=lambda strategy: type(strategy).__name__)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_off_is_off(specimen, strategy, cfg):
    plain = specimen.sampled(None, cfg, steps=3)
    assert equal(specimen.sampled(strategy, cfg, steps=3).latent, plain.latent)


def test_the_right_lists_of_blocks_are_found(specimen):
    report = specimen.sampled(NEVER_MET).report
    found = tuple(name.split(" ", 1)[1] for name in report.blocks.split(" + ") if report.blocks[:1].isdigit())
    assert found == specimen.architecture.chains, report.notes
    if not found:
        assert any("no chain of blocks was found" in note for note in report.notes)


def test_the_measure_is_taken_on_what_changes_and_measuring_changes_nothing(specimen):
    sampled = specimen.sampled(NEVER_MET)
    assert equal(sampled.latent, specimen.sampled(None).latent)
    assert sampled.report.count("reused", "forecast") == 0
    if specimen.architecture.chains:
        measures = [call.measure for call in sampled.report.calls if call.measure is not None]
        assert len(measures) >= STEPS - 3
        assert min(measures) > 1e-4 and max(measures) > 1.2 * min(measures)


@by_title
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_it_reuses(specimen, strategy, cfg):
    """Along a short way in noise, as when a picture is refined: there even random models change little."""
    plain, cached = specimen.sampled(None, cfg, 0.1), specimen.sampled(strategy, cfg, 0.1)
    can_reuse = isinstance(strategy, TaylorSeerCache) or bool(specimen.architecture.chains)
    if isinstance(strategy, WITH_ATTENTION):
        can_reuse = bool(specimen.architecture.attention)
        if isinstance(strategy, FasterCache):
            pictures = len(specimen.architecture.latent) in (4, 5) and not isinstance(
                specimen.architecture.latent[0], tuple
            )
            can_reuse = "spatial" in specimen.architecture.attention or (pictures and cfg > 1)
    if not can_reuse:
        assert equal(cached.latent, plain.latent)
        assert cached.report.notes, "the report must say why nothing was reused"
        return
    assert cached.report.count("reused", "forecast") > 0, cached.report.notes
    assert all(torch.isfinite(part).all() for part in parts(cached.latent))
    assert not equal(cached.latent, plain.latent)
    assert cached.flops < plain.flops
    if not isinstance(strategy, WITH_ATTENTION) and specimen.architecture.chains:
        main = f"{specimen.architecture.chains[-1]}."
        ran, possible = (
            sum(count for name, count in runs.blocks.items() if name.startswith(main)) for runs in (cached, plain)
        )
        assert ran <= 0.5 * possible


@by_title
def test_nothing_stays_behind(specimen, strategy):
    sampled = specimen.sampled(strategy, 3.0, 0.1)
    gc.collect()
    assert specimen.traces() == specimen.before
    assert not [tensor for tensor in sampled.held if tensor() is not None]
    assert equal(sampled.start, specimen.architecture.content())


@dataclass(frozen=True)
class Replay(Strategy):
    """Computes, then reuses: what comes out for the same inputs must be the same."""

    probes: bool = False
    title = "Replay"
    levels = ("model",)

    def new_state(self, site):
        return History(capacity=1)

    def around(self, call, state):
        if self.probes:
            yield FIRST_BLOCK
        if call.may_reuse:
            return state.combined([1.0])
        state.add(0.0, (yield COMPUTE))


def replayed(specimen: Specimen, model: Any, strategy: Strategy) -> tuple[float, Counter, Any]:
    """Relative error of the last of several evaluations of the same inputs to the first; the blocks that ran in it."""
    import comfy.sample
    import comfy.samplers

    from cache_core.adapters.comfyui import with_cache

    architecture, predictions, reports = specimen.architecture, [], []

    def evaluate(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        for _ in range(4):
            specimen.blocks.clear()
            predictions.append(x - denoiser(x.clone(), sigmas[0] * x.new_ones([x.shape[0]]), **extra_args))
        return x

    positive, negative = architecture.prompts()
    comfy.sample.sample_custom(
        with_cache(model, strategy, on_report=lambda report, _: reports.append(report)),
        architecture.noise(), 3.0, comfy.samplers.KSAMPLER(evaluate), torch.tensor([0.7, 0.0]) * sigma_scale(model),
        positive, negative, architecture.content(), noise_mask=None, callback=None, disable_pbar=True, seed=0,
    )  # fmt: skip
    error = (predictions[-1] - predictions[0]).norm() / predictions[0].norm()
    return error.item(), Counter(specimen.blocks), reports[0]


def additions_of(architecture: Any) -> dict[str, Any]:
    """All that may flow beside its blocks."""
    return architecture.additions | of_blocks(architecture)


def sigma_scale(model: Any) -> float:
    """What a sigma of 1 is to a flow model, to this model."""
    highest = float(model.get_model_object("model_sampling").sigma_max)
    return 1.0 if highest <= 1.5 else 3.0


@pytest.mark.parametrize("probes", [False, True], ids=["whole stack", "behind the first block"])
def test_a_replayed_step_is_the_computed_step(specimen, probes):
    if not specimen.architecture.chains:
        pytest.skip("no blocks are cached in it")
    for name, add in ({"alone": lambda model: model} | additions_of(specimen.architecture)).items():
        error, ran, report = replayed(specimen, add(specimen.model), Replay(probes=probes))
        assert report.calls[-1].action == "reused", (name, report.notes)
        assert sum(ran.values()) <= 2 * max(1, len(report.calls) // 4), name  # the first block at most, of each call
        assert error <= 1e-6, name


def test_what_is_added_beside_the_blocks_keeps_its_effect(specimen):
    if not additions_of(specimen.architecture):
        pytest.skip("it takes none")
    for name, add in additions_of(specimen.architecture).items():
        from cache_core.adapters.comfyui import with_cache

        sample, start = specimen.architecture.sample, specimen.architecture.empty_latent
        plain, added = specimen.sampled(None).latent, sample(add(specimen.model), start())
        cached = sample(with_cache(add(specimen.model), TaylorSeerCache(cache_interval=2)), start())
        if is_older() and equal(plain, added):  # this ComfyUI does not ask for such patches
            continue
        assert not equal(plain, added), name
        distance = [sum((a - b).norm() for a, b in zip(parts(cached), parts(other))) for other in (added, plain)]
        assert distance[0] < distance[1], name


@by_title
def test_a_model_that_draws_frame_by_frame_is_computed_in_full(comfy, strategy):
    from cache_core.adapters.comfyui import with_cache

    architecture, reports = next(one for one in all_architectures() if one.name == "Causal Wan"), []
    if not architecture.is_here:
        pytest.skip("this ComfyUI does not have it")
    model = frame_by_frame(architecture.build())
    cached = with_cache(model, strategy, on_report=lambda report, _: reports.append(report))
    plain = architecture.sample(model, architecture.empty_latent(), steps=4)
    assert torch.equal(architecture.sample(cached, architecture.empty_latent(), steps=4), plain)
    assert reports[0].count("reused", "forecast") == 0
    assert any("frame by frame" in note for note in reports[0].notes)


@pytest.fixture(scope="module", params=params()[::3])
def specimen_in_half_precision(request, comfy):
    yield from specimen_of(request.param, torch.bfloat16)


@by_title
def test_in_bfloat16_off_is_off_and_it_reuses(specimen_in_half_precision, strategy):
    specimen = specimen_in_half_precision
    off = next(one for one in OFF if type(one) is type(strategy))
    assert equal(specimen.sampled(off, steps=3).latent, specimen.sampled(None, steps=3).latent)
    cached = specimen.sampled(strategy, 3.0, 0.1)
    assert all(torch.isfinite(part).all() for part in parts(cached.latent))
    if specimen.architecture.chains:
        assert cached.report.count("reused", "forecast") > 0
        assert cached.flops < specimen.sampled(None, 3.0, 0.1).flops


def test_every_model_file_of_this_comfyui_is_in_the_zoo(comfy):
    import comfy.model_base

    source = inspect.getsource(comfy.model_base)
    modules = set(re.findall(r"unet_model=comfy\.ldm\.([\w.]+)\.\w+", source))
    files = {module.replace(".", "/") + ".py" for module in modules}
    covered = {architecture.covers for architecture in all_architectures()}
    assert len(files) > (20 if is_older() else 30)
    assert files - covered - set(NO_DENOISERS) == set()


def test_every_strategy_is_tested_here():
    assert {type(strategy) for strategy in OFF} == {type(strategy) for strategy in AGGRESSIVE} == set(all_strategies())


@pytest.fixture(scope="session")
def rows(request):
    """What is measured for docs/models.md; written at the end if that is asked for."""
    collected: list[Row] = []
    yield collected
    if request.config.getoption("--write-models"):
        MODELS.write_text(written(collected), encoding="utf-8")


def test_docs_models_tells_what_was_found(specimen, rows):
    architecture = specimen.architecture
    skipped = {}
    for strategy in AGGRESSIVE:
        sampled, plain = specimen.sampled(strategy, 3.0, 0.1), specimen.sampled(None, 3.0, 0.1)
        skipped[type(strategy).__name__] = 1 - sampled.flops / plain.flops
    rows.append(row := Row(architecture, skipped))
    known = rows_in(MODELS.read_text(encoding="utf-8"))
    assert known.get(architecture.name) == row.facts, "run the zoo with --write-models"
