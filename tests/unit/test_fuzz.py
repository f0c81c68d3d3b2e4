"""Whatever the settings, the schedule, the order of calls and the way branches are joined: the promises hold.

Deterministic: hypothesis draws the same examples every time.
"""

import weakref
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch
from toy import TEXT, C, Sampling, Toy, alive, first_latent, sigmas_of, tensors_in, traces_on

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

fuzzed = hypothesis.settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
NAMES = ("one", "two", "three")
RANGES = st.sampled_from([2, 3, 5, 1])
FEW_STEPS = st.just("draft")  # journeys are short


def texts(scale=1.0):
    """Prompts that are told apart; all but the first are scaled."""
    generator = torch.Generator().manual_seed(3)
    drawn = {name: torch.randn(1, TEXT, C, generator=generator) for name in NAMES}
    return {name: text if name == NAMES[0] else scale * text for name, text in drawn.items()}


def latents(scale=1.0, rows=1):
    return {name: first_latent(rows, seed=n) * (scale if n else 1.0) for n, name in enumerate(NAMES)}


@st.composite
def windows(draw):
    return draw(st.sampled_from([-1, 150, 400])), draw(st.sampled_from([1001, 900, 600]))


@st.composite
def first_block(draw):
    start = draw(st.sampled_from([0.0, 0.1, 0.4]))
    return FirstBlockCache(
        residual_diff_threshold=draw(st.sampled_from([0.05, 0.2, 0.5, 1.0])),
        start_percent=start,
        end_percent=draw(st.sampled_from([0.7, 1.0])),
        max_consecutive_cache_hits=draw(st.integers(-1, 4)),
        max_order=draw(st.integers(0, 3)),
    )


@st.composite
def taylorseer(draw):
    before = draw(st.integers(0, 4))
    return TaylorSeerCache(
        cache_interval=draw(RANGES),
        max_order=draw(st.integers(0, 3)),
        disable_cache_before_step=before,
        disable_cache_after_step=draw(st.sampled_from([-1, before + 1, before + 3])),
        cache_level=draw(st.sampled_from(["output", "model", "block", "module"])),
        spacing=draw(st.sampled_from(["sigma", "steps"])),
        weights=draw(st.sampled_from(["sigma", "recursion"])),
        few_steps=draw(FEW_STEPS),
    )


@st.composite
def attention(draw):
    kind, (start, end) = draw(st.sampled_from([PyramidAttentionBroadcast, FasterCache])), draw(windows())
    return kind(
        spatial_attention_block_skip_range=draw(st.integers(2, 5)),
        spatial_attention_timestep_skip_start=start,
        spatial_attention_timestep_skip_end=end,
        few_steps=draw(FEW_STEPS),
    )


any_strategy = st.one_of(first_block(), taylorseer(), attention())
off = st.one_of(
    st.builds(FirstBlockCache, residual_diff_threshold=st.just(0.0), max_order=st.integers(0, 3)),
    st.builds(FirstBlockCache, max_consecutive_cache_hits=st.just(0)),
    st.builds(TaylorSeerCache, cache_interval=st.just(1), cache_level=st.sampled_from(["output", "model", "module"])),
    st.just(PyramidAttentionBroadcast(spatial_attention_block_skip_range=1)),
    st.just(FasterCache(spatial_attention_block_skip_range=1, unconditional_batch_skip_range=1)),
)


@dataclass(frozen=True)
class Journey:
    """A schedule, and for each evaluation its step and the groups of branches that are joined in one call."""

    sigmas: tuple[float, ...]
    evaluations: tuple[tuple[int, tuple[tuple[str, ...], ...]], ...]
    rows: int
    in_place: bool


@st.composite
def journeys(draw):
    steps, evaluations = draw(st.sampled_from([8, 10, 5, 1])), []
    usual = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    for step in range(steps):
        for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):  # twice a step, as Heun
            is_odd = draw(st.integers(1, 8)) == 8  # some prompts have a range
            names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True)) if is_odd else usual
            ordered = sorted(names, key=NAMES.index) if draw(st.booleans()) else names
            evaluations.append((step, draw(st.sampled_from(_cuts(tuple(ordered))))))
    sigmas = tuple(sigmas_of(steps, shift=draw(st.sampled_from([1.0, 3.0, 6.0]))))
    return Journey(sigmas, tuple(evaluations), draw(st.integers(1, 2)), draw(st.booleans()))


def _cuts(names):
    """All ways to cut a list of branches into calls."""
    if not names:
        return [()]
    return [(names[:size], *rest) for size in range(1, len(names) + 1) for rest in _cuts(names[size:])]


def _led_by(first, groups):
    """The same calls, this branch in the first of them, if it is in one at all."""
    if not any(first in names for names in groups):
        return groups
    others = [tuple(name for name in names if name != first) for names in groups]
    return ((first,), *(names for names in others if names))


def travelled(journey, strategies, scale=1.0):
    """The sampling run, the output of each call by branch, and the evaluation that it belongs to."""
    sampling = Sampling(Toy(in_place=journey.in_place), strategies, sigmas=list(journey.sigmas), texts=texts(scale))
    now, outputs = latents(scale, journey.rows), []
    for number, (step, groups) in enumerate(journey.evaluations):
        if sampling.run is not None:
            sampling.run.begin_evaluation()
        length = journey.sigmas[step + 1] - journey.sigmas[step]
        for names in groups:
            given = {name: now[name] for name in names}
            predicted = sampling.call(given, journey.sigmas[step], names)
            outputs.append((number, predicted))
            now = now | {name: now[name] + length / 4 * output for name, output in predicted.items()}
    return sampling, outputs


@fuzzed
@hypothesis.given(journeys(), off)
def test_off_is_exact(journey, strategy):
    (sampling, outputs), (_, plain) = travelled(journey, (strategy,)), travelled(journey, None)
    assert all(torch.equal(some[name], other[name]) for (_, some), (_, other) in zip(outputs, plain) for name in some)
    assert sampling.run.state.memories == {}


@fuzzed
@hypothesis.given(journeys(), any_strategy)
def test_what_is_computed_in_full_before_any_reuse_is_exact(journey, strategy):
    (sampling, outputs), (_, plain) = travelled(journey, (strategy,)), travelled(journey, None)
    for (_, some), (_, other), call in zip(outputs, plain, sampling.report.calls, strict=True):
        if call.action != "computed":
            break
        assert all(torch.equal(some[name], other[name]) for name in some)


@fuzzed
@hypothesis.given(journeys(), any_strategy, st.sampled_from([-3.0, 0.1, 40.0]))
def test_no_branch_depends_on_what_another_was_given(journey, strategy, scale):
    first = NAMES[0]
    evaluations = tuple((step, _led_by(first, groups)) for step, groups in journey.evaluations)  # all decide by it
    journey = replace(journey, evaluations=evaluations)
    (_, outputs), (_, others) = travelled(journey, (strategy,)), travelled(journey, (strategy,), scale)
    for (_, some), (_, other) in zip(outputs, others, strict=True):
        if first in some:
            assert torch.equal(some[first], other[first])


@fuzzed
@hypothesis.given(journeys(), any_strategy)
def test_every_reuse_was_allowed(journey, strategy):
    sampling, outputs = travelled(journey, (strategy,))
    hits, called, present = defaultdict(int), defaultdict(set), defaultdict(set)
    for number, (_, groups) in enumerate(journey.evaluations):
        present[number] = {name for names in groups for name in names}
    for (number, predicted), call in zip(outputs, sampling.report.calls, strict=True):
        called[number] |= set(predicted)
        is_reused = call.action != "computed"
        for name in predicted:
            hits[name] = hits[name] + 1 if is_reused else 0
        if not is_reused:
            continue
        assert number > 0 and called[number] <= present[number - 1]  # no branch was new, or back after a while
        assert all(output.isfinite().all() for output in predicted.values())
        is_repeated = journey.evaluations[number][0] == journey.evaluations[number - 1][0]
        assert_allowed(strategy, sampling, call, max(hits[name] for name in predicted), is_repeated)


def assert_allowed(strategy, sampling, call, hits, is_repeated):
    """By the settings' own words, not by the code that is tested. A step may be asked for twice, at the same sigma."""
    step, steps = call.step, len(sampling.sigmas) - 1
    if isinstance(strategy, FirstBlockCache):
        assert 0 < call.measure < strategy.residual_diff_threshold
        assert strategy.max_consecutive_cache_hits == -1 or hits <= strategy.max_consecutive_cache_hits
        share = [place / steps for place in (step.index, step.index + 1)]
        assert strategy.start_percent <= share[1] and share[0] <= strategy.end_percent
    elif isinstance(strategy, TaylorSeerCache):
        after, before = strategy.disable_cache_after_step, strategy.disable_cache_before_step
        assert after == -1 or step.index < after
        assert step.index > 0 or is_repeated
        if strategy.spacing == "steps" and not is_repeated:
            assert step.index >= before and (step.index - before + 1) % strategy.cache_interval
    else:
        start, end = (getattr(strategy, f"spatial_attention_timestep_skip_{side}") for side in ("start", "end"))
        assert start < step.timestep < end
        assert hits < strategy.spatial_attention_block_skip_range


@fuzzed
@hypothesis.given(journeys(), any_strategy)
def test_nothing_is_left_at_the_end(journey, strategy):
    sampling, _ = travelled(journey, (strategy,))
    kept = [weakref.ref(tensor) for tensor in tensors_in(list(sampling.run.state.memories.values()))]
    may_be_done = isinstance(strategy, (PyramidAttentionBroadcast, FasterCache))  # they drop what no step may reuse,
    last = sampling.report.calls[-1].step.index
    may_be_done |= 0 <= getattr(strategy, "disable_cache_after_step", -1) <= last  # as does TaylorSeer from there on
    assert kept or may_be_done or strategy.is_off or sampling.report.count("reused") == 0
    assert traces_on(sampling.toy) == []
    sampling.run.free()
    assert alive(kept) == 0


def test_the_examples_do_reuse():
    seen = defaultdict(int)

    @fuzzed
    @hypothesis.given(journeys(), any_strategy)
    def look(journey, strategy):
        sampling, _ = travelled(journey, (strategy,))
        seen[type(strategy)] += sampling.report.count("reused", "forecast")

    look()
    assert len(seen) == 4 and min(seen.values()) >= 40
