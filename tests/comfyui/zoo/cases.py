"""What the zoo's tests run for: settings of all strategies, and which architectures a claim is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.strategy import Strategy

from . import all_architectures
from .additions import all_of
from .architecture import Architecture

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
    TaylorSeerCache(cache_interval=4, disable_cache_before_step=1, few_steps="draft"),
    PyramidAttentionBroadcast(
        spatial_attention_block_skip_range=4,
        cross_attention_block_skip_range=4,
        cross_attention_timestep_skip_start=-1,
        cross_attention_timestep_skip_end=1001,
        few_steps="draft",
        **ALWAYS,
    ),
    FasterCache(
        unconditional_batch_skip_range=5, unconditional_batch_timestep_skip_end=1001, few_steps="draft", **ALWAYS
    ),
]
# Where the first axis is not the branches', two in one call are other shapes than one alone. FasterCache calls them in
# either way, so each prompt's attention has its second output only after the usual 8 steps.
STEPS_TO_HOLD_ALL = {("Cosmos 1", "FasterCache"): 12}
EVERY = all_architectures()
WITH_BLOCKS = [architecture for architecture in EVERY if architecture.chains]
WITHOUT_BLOCKS = [architecture for architecture in EVERY if not architecture.chains]
UNLIKE_EACH_OTHER = [  # two kinds of blocks, two streams, one, sound beside it, no axis of branches
    architecture
    for architecture in EVERY
    if architecture.name in ("Flux", "Qwen-Image", "Wan 2.1 t2v", "LTX-2", "Cosmos 1", "MiniMax-H3")
]
EVERY_THIRD = EVERY[::3]
EVERY_THIRD_WITH_BLOCKS = [architecture for architecture in EVERY_THIRD if architecture.chains]


@dataclass(frozen=True)
class Refinement:
    """A strategy, far too fast, on one architecture at one strength of guidance."""

    architecture: Architecture
    strategy: Strategy
    cfg: float

    def __str__(self) -> str:
        return f"{self.architecture.name}-{name_of(self.strategy)}-cfg {self.cfg:g}"

    @property
    def reuses(self) -> bool:
        return self.architecture.reuses(name_of(self.strategy), self.cfg)

    @property
    def leaves_out_blocks(self) -> bool:
        """Whole ones: the others leave out the attention within blocks."""
        return bool(self.architecture.chains) and isinstance(self.strategy, (FirstBlockCache, TaylorSeerCache))


@dataclass(frozen=True)
class Added:
    """Something that flows beside the blocks of one architecture: the name of an addition, or "alone"."""

    architecture: Architecture
    name: str
    probes: bool = False  # reuses behind the first block

    def to(self, patcher: Any) -> Any:
        """The model with that addition."""
        return patcher if self.name == "alone" else all_of(self.architecture)[self.name](patcher)

    def __str__(self) -> str:
        return f"{self.architecture.name}-{self.name}{'-behind the first block' * self.probes}"


def name_of(strategy: Strategy) -> str:
    return type(strategy).__name__


REFINEMENTS = [
    Refinement(architecture, strategy, cfg) for architecture in EVERY for strategy in AGGRESSIVE for cfg in (1.0, 3.0)
]
REUSING = [case for case in REFINEMENTS if case.reuses]
NOT_REUSING = [case for case in REFINEMENTS if not case.reuses]
LEAVING_OUT_BLOCKS = [case for case in REUSING if case.leaves_out_blocks]
ADDITIONS = [Added(architecture, name) for architecture in EVERY for name in all_of(architecture)]
ALONE = [Added(architecture, "alone") for architecture in WITH_BLOCKS]
BESIDE_BLOCKS = [case for case in ADDITIONS if case.architecture.chains]
REPLAYS = [replace(case, probes=probes) for case in (*ALONE, *BESIDE_BLOCKS) for probes in (False, True)]


def for_each(architectures: Iterable[Architecture], fixture: str = "specimen") -> pytest.MarkDecorator:
    """The test runs with a specimen of each of these."""
    return pytest.mark.parametrize(
        fixture, [pytest.param(each, id=each.name, marks=_marks(each)) for each in architectures], indirect=True
    )


def for_each_case(fixture: str, cases: Iterable[Refinement | Added]) -> pytest.MarkDecorator:
    """The test runs with this fixture made of each case, and of a specimen of its architecture.

    The specimen stands last, and no two architectures share a case: so pytest runs what is of one together.
    """
    found = [pytest.param(case, case.architecture, id=str(case), marks=_marks(case.architecture)) for case in cases]
    return pytest.mark.parametrize((fixture, "specimen"), found, indirect=True)


def _marks(architecture: Architecture) -> list[pytest.MarkDecorator]:
    return [pytest.mark.xdist_group(architecture.name), *[pytest.mark.slow] * architecture.is_slow]
