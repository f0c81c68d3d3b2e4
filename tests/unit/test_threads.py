"""Branches in threads, each on a model of its own, as ComfyUI runs them on several devices."""

import copy
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from toy import (
    IMAGE,
    NEGATIVE,
    POSITIVE,
    TEXTS,
    C,
    EverySecondStep,
    OperationsBlock,
    ReuseAlways,
    Sampling,
    TextBeside,
    Toy,
    alive,
    first_latent,
    tensors_in,
    through_run,
    traces_on,
)

from cache_core.run import evaluation
from cache_core.run.evaluation import NO_LEADER
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

MANY = [
    FirstBlockCache(),
    FirstBlockCache(residual_diff_threshold=0.3, max_order=0),
    TaylorSeerCache(cache_interval=2, cache_level="output"),
    TaylorSeerCache(cache_interval=2, cache_level="model"),
    TaylorSeerCache(cache_interval=2, cache_level="module"),
    PyramidAttentionBroadcast(),
    FasterCache(),
    EverySecondStep(),
]
LIMIT = 20  # seconds until a test that hangs has failed


@dataclass
class Threads(Sampling):
    """Calls each branch in a thread of its own, on a clone of its own; without threads one after the other."""

    late: str | None = None  # the branch whose thread begins last
    are_on: bool = True
    models: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [*self.branches, *(name for name in self.texts if name not in self.branches)]
        self.models = self.models or {name: copy.deepcopy(self.toy) for name in names}
        self.pools = {name: ThreadPoolExecutor(1) for name in names}

    @property
    def leader(self):
        return self.models[self.branches[0]]

    def calls(self, latents, index):
        begun = threading.Event()

        def call(name):
            torch.set_grad_enabled(False)  # each thread has a switch of its own
            if name == self.late and self.are_on and len(latents) > 1:
                begun.wait(LIMIT)
                time.sleep(0.01)  # the others are at work, or wait for this one
            if name != self.late:
                begun.set()
            return Sampling.call(Bound(self, self.models[name]), {name: latents[name]}, self.sigmas[index], (name,))

        with self.run.state.evaluation.in_threads(list(latents)):
            if not self.are_on:
                return {name: call(name)[name] for name in latents}
            self.run.state.evaluation.begin_threads(self.leader, [self.models[name] for name in latents])
            futures = {name: self.pools[name].submit(call, name) for name in latents}
            errors = [future.exception(LIMIT) for future in futures.values()]
            for error in filter(None, errors):
                raise error
            return {name: future.result()[name] for name, future in futures.items()}


@dataclass
class Bound:
    """A sampling, as seen from a thread: with the model that is called there."""

    sampling: Threads
    toy: torch.nn.Module

    def __getattr__(self, name):
        return getattr(self.sampling, name)


def decisions(report):
    return sorted((call.evaluation, call.branches, call.action, call.measure) for call in report.calls)


def in_words(strategy):
    return f"{type(strategy).__name__}-{strategy.levels[0]}"


@pytest.mark.parametrize("late", [NEGATIVE, POSITIVE])
@pytest.mark.parametrize("strategy", MANY, ids=in_words)
def test_threads_decide_and_draw_as_one_thread_does_whichever_is_first(toy, strategy, late):
    one = Threads(toy, (strategy,), are_on=False)
    expected = one.sample(first_latent())
    threads = Threads(toy, (strategy,), late=late)
    assert torch.equal(threads.sample(first_latent()), expected)
    assert decisions(threads.report) == decisions(one.report)
    assert threads.report.count("reused", "forecast") >= 4
    assert threads.report.notes == one.report.notes == []
    assert threads.report.bytes_held == one.report.bytes_held > 0


@dataclass
class MovedThreads(Threads):
    """One branch, the one that begins last, comes to another model in mid-run."""

    def calls(self, latents, index):
        if index == 6:
            self.models[self.late] = copy.deepcopy(self.toy)
        return super().calls(latents, index)


@pytest.mark.parametrize("late", [NEGATIVE, POSITIVE])
@pytest.mark.parametrize("strategy", [*MANY, FirstBlockCache(residual_diff_threshold=1.0), ReuseAlways()], ids=in_words)
def test_a_branch_that_comes_to_another_model_makes_all_compute(toy, strategy, late):
    threads = MovedThreads(toy, (strategy,), late=late)
    threads.sample(first_latent())
    actions = {}
    for call in threads.report.calls:
        actions.setdefault(call.evaluation, set()).add(call.action == "computed")
    assert actions[7] == {True} and all(len(each) == 1 for each in actions.values())
    assert threads.report.count("reused", "forecast") >= 4


def test_threads_draw_what_an_ordinary_run_on_one_model_draws(toy):
    expected = Sampling(Toy(), (FirstBlockCache(),), layout="separate").sample(first_latent())
    assert torch.equal(Threads(toy, (FirstBlockCache(),), late=NEGATIVE).sample(first_latent()), expected)


def test_attention_operations_go_to_the_call_of_their_own_thread():
    strategy = PyramidAttentionBroadcast(spatial_attention_timestep_skip_end=1001)
    results = []
    for are_on in (True, False):
        sampling = Threads(TextBeside(OperationsBlock), (strategy,), are_on=are_on, late=NEGATIVE)
        meeting = threading.Barrier(2 if are_on else 1)  # both threads are inside the model at once
        for model in sampling.models.values():
            through_run(model, sampling.run)
            model.blocks[1].register_forward_pre_hook(lambda *_, meeting=meeting: meeting.wait(LIMIT) < 0 or None)
        drawn, kept = sampling.sample(first_latent()), sampling.run.state.memories
        places = {(name, strategy, site) for ((name, *_), _), strategy, site in kept}
        results.append((drawn, decisions(sampling.report), places))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert any(action == "reused" for _, _, action, _ in results[0][1])


@pytest.mark.parametrize("late", [NEGATIVE, POSITIVE, "new"])
@pytest.mark.parametrize("strategy", [FirstBlockCache(residual_diff_threshold=1.0), ReuseAlways()], ids=in_words)
def test_with_a_new_branch_all_compute_whichever_thread_is_first(toy, strategy, late):
    texts = TEXTS | {"new": torch.ones(1, 6, C)}
    sampling = Threads(toy, (strategy,), late=late, texts=texts)
    latent = first_latent()
    for index in range(6):
        names = (NEGATIVE, POSITIVE) if index < 4 else (NEGATIVE, POSITIVE, "new")
        sampling.predict(dict.fromkeys(names, latent * (1 + index / 50)), index)
    actions = {}
    for call in sampling.report.calls:
        actions.setdefault(call.evaluation, set()).add(call.action == "computed")
    assert actions[5] == {True}
    assert actions[4] == actions[6] == {False}


@pytest.mark.parametrize("failing", [NEGATIVE, POSITIVE])
@pytest.mark.parametrize("late", [NEGATIVE, POSITIVE])
def test_a_thread_that_fails_keeps_no_other_waiting(toy, failing, late):
    sampling = Threads(toy, (FirstBlockCache(residual_diff_threshold=1.0),), late=late)
    latents = dict.fromkeys(sampling.branches, first_latent())
    for index in range(3):
        sampling.predict(latents, index)

    def fail(*_):
        raise RuntimeError("cancelled")

    sampling.models[failing].double_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="cancelled"):
        sampling.predict(latents, 3)
    assert all(traces_on(model) == [] for model in sampling.models.values())


def test_a_leader_that_never_comes_costs_one_wait_then_all_is_computed_and_said_once(toy, monkeypatch):
    monkeypatch.setattr(evaluation, "PATIENCE", 0.2)
    sampling = Threads(toy, (FirstBlockCache(residual_diff_threshold=1.0),))
    latents = dict.fromkeys(sampling.branches, first_latent())
    for index in range(3):
        sampling.predict({name: latent * (1 + index / 50) for name, latent in latents.items()}, index)
    assert sampling.report.calls[-1].action != "computed"
    monkeypatch.setattr(Threads, "leader", Toy())
    for index in (3, 4, 5):
        sampling.predict({name: latent * (1 + index / 50) for name, latent in latents.items()}, index)
    assert [call.action for call in sampling.report.calls[-6:]] == ["computed"] * 6
    assert sampling.report.notes == [NO_LEADER]


def test_two_threads_on_one_model_take_turns(toy):
    models = dict.fromkeys((NEGATIVE, POSITIVE), toy)
    threads = Threads(toy, (FirstBlockCache(),), models=models)
    latent = threads.sample(first_latent())
    expected = Sampling(Toy(), (FirstBlockCache(),), layout="separate").sample(first_latent())
    torch.testing.assert_close(latent, expected, rtol=1e-2, atol=1e-2)  # either branch may have measured
    assert threads.report.count("reused", "forecast") >= 4
    assert traces_on(toy) == [] and toy.double_blocks[0].runs == 2 * 12


def test_what_threads_kept_is_gone_with_the_run(toy):
    sampling = Threads(toy, (FirstBlockCache(), TaylorSeerCache(cache_level="module")))
    sampling.sample(first_latent(tokens=IMAGE))
    kept = [weakref.ref(tensor) for tensor in tensors_in(list(sampling.run.state.memories.values()))]
    assert kept
    sampling.run.free()
    assert alive(kept) == 0
