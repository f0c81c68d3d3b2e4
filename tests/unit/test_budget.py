"""What a run may hold: sites that do not fit are left out, what is foretold is held, no lack of memory ends a run."""

import re
from contextlib import nullcontext

import pytest
import torch
from test_failures import NO_MEMORY_LEFT, Interrupted, with_cancels
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import (
    IMAGE,
    POSITIVE,
    TEXT,
    Attention,
    FeedForward,
    GuidedSampling,
    Sampling,
    TextBeside,
    ThreeKindsBlock,
    Toy,
    W,
    first_latent,
    relative_error,
    uncached,
)

from cache_core.run import budget
from cache_core.run.memory import bytes_held
from cache_core.run.run import CacheRun
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy import Schedule

ATTENTION = 16 * 16 * 4  # bytes of what an attention or a block of the toy gives: 16 tokens of 16 channels in float32
BROADCAST = {"spatial_attention_timestep_skip_start": -1, "spatial_attention_timestep_skip_end": 1001}
STRATEGIES = {
    "first block": FirstBlockCache(residual_diff_threshold=1.0),
    "output": TaylorSeerCache(cache_interval=3),
    "model": TaylorSeerCache(cache_interval=3, cache_level="model"),
    "block": TaylorSeerCache(cache_interval=3, cache_level="block"),
    "module": TaylorSeerCache(cache_interval=3, cache_level="module"),
    "broadcast": PyramidAttentionBroadcast(**BROADCAST),
    "faster": FasterCache(spatial_attention_timestep_skip_end=1001),
}
by_strategy = pytest.mark.parametrize("name", STRATEGIES)


def with_free(sampling, free, **settings):
    """The same sampling with so many bytes free."""
    sampling.run = CacheRun(sampling.strategies, Schedule(sampling.sigmas), free=lambda device: free, **settings)
    return sampling


@by_strategy
def test_what_is_foretold_is_held(toy, name):
    sampling = Sampling(toy, (STRATEGIES[name],))
    sampling.sample(first_latent())
    assert sampling.report.count("reused", "forecast") >= 2
    assert 0 < sampling.report.bytes_held <= sampling.report.bytes_foretold <= 1.05 * sampling.report.bytes_held


@pytest.mark.parametrize("layout", ["joined", "separate"])
@pytest.mark.parametrize("name, held", [("broadcast", 1), ("faster", 2), ("block", 2)])
def test_sites_that_do_not_fit_into_what_is_free_always_run(toy, name, held, layout):
    branches, fitting = 2, 2
    free = ATTENTION * branches * held * fitting
    sampling = with_free(Sampling(toy, (STRATEGIES[name],), layout=layout), free)
    latent, steps = sampling.sample(first_latent()), len(sampling.sigmas) - 1
    assert 0.9 * free <= sampling.report.bytes_held <= free
    sites = len(toy.blocks)
    always = [unit.rows == branches * steps for unit in toy.units("attention" if name != "block" else "block")]
    assert sorted(always) == [False] * fitting + [True] * (sites - fitting)
    (note,) = [note for note in sampling.report.notes if "fit in" in note]
    assert f"{fitting} of {sites} " in note and "what was free" in note
    assert relative_error(latent, uncached(Toy(), first_latent())) < 0.2


def test_a_limit_of_the_strategy_s_own_comes_before_what_is_free(toy, monkeypatch):
    monkeypatch.setattr(budget, "GIB", ATTENTION * 2)  # for two branches
    strategy = PyramidAttentionBroadcast(memory_limit_gb=3.0, **BROADCAST)
    sampling = with_free(Sampling(toy, (strategy,)), 0.0)
    sampling.sample(first_latent())
    assert sampling.report.bytes_held == 3 * ATTENTION * 2
    assert any("3 of 5 attentions fit in 3 GiB (memory_limit_gb)" in note for note in sampling.report.notes)


class Widened(nn.Module):
    """Attention and a feed-forward of so many features: both give as many bytes, the wider for more work."""

    def __init__(self, features):
        super().__init__()
        self.runs = self.rows = 0
        self.attn, self.mlp = Attention(), FeedForward()
        self.attn.qkv, self.attn.out = nn.Linear(W, 3 * features), nn.Linear(features, W)
        self.mlp.wide, self.mlp.narrow = nn.Linear(W, features), nn.Linear(features, W)

    def forward(self, x, text, vec):
        self.runs, self.rows = self.runs + 1, self.rows + len(x)
        x = x + self.attn(x + vec)
        return x + self.mlp(x + vec)


FEATURES = (8, 32, 16, 64, 16, 48)


def widened():
    model = TextBeside(Widened, count=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.blocks = nn.ModuleList(map(Widened, FEATURES))
    return model.requires_grad_(False)


@pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
@pytest.mark.parametrize("name, held", [("broadcast", 1), ("faster", 2), ("block", 2)])
def test_what_saves_most_work_a_byte_is_kept(name, held, layout):
    free = 3 * IMAGE * W * 4 * 2 * held  # three sites, in float32, for two branches
    sampling = with_free(Sampling(widened(), (STRATEGIES[name],), layout=layout), free)
    sampling.sample(first_latent())
    units = [block if name == "block" else block.attn for block in sampling.toy.blocks]
    assert [unit.rows < 24 for unit in units] == [width in (32, 64, 48) for width in FEATURES]
    assert 0.9 * free <= sampling.report.bytes_held <= free
    (note,) = [note for note in sampling.report.notes if "fit in" in note]
    assert f"3 of 6 {'block' if name == 'block' else 'attention'}s fit in" in note
    assert sampling.report.count("reused", "forecast") >= 2


def test_where_nothing_can_be_counted_parameters_tell(monkeypatch):
    monkeypatch.setattr("cache_core.model.counting.Counter.watching", lambda *_: [])  # as where all is compiled
    sampling = with_free(Sampling(widened(), (STRATEGIES["broadcast"],)), 3 * IMAGE * W * 4 * 2)
    sampling.sample(first_latent())
    assert [block.attn.rows < 24 for block in sampling.toy.blocks] == [width in (32, 64, 48) for width in FEATURES]


def test_of_modules_of_two_kinds_too():
    """Each attention here takes more than any feed-forward, as it has as many features, and keys."""
    sampling = with_free(Sampling(widened(), (STRATEGIES["module"],)), 6 * IMAGE * W * 4 * 2 * 2)
    sampling.sample(first_latent())
    parts = [(kind, width, getattr(block, kind)) for block, width in zip(sampling.toy.blocks, FEATURES) for kind in
             ("attn", "mlp")]  # fmt: skip
    work = {(kind, width): width * (8 * W + 4 * IMAGE if kind == "attn" else 4 * W) for kind, width, _ in parts}
    kept = [work[kind, width] for kind, width, part in parts if part.rows < 24]
    assert sorted(kept) == sorted(work[kind, width] for kind, width, _ in parts)[-6:]


def test_of_equals_those_are_kept_that_are_met_first(toy):
    sampling = with_free(Sampling(toy, (STRATEGIES["broadcast"],)), 2 * ATTENTION * 2)
    sampling.sample(first_latent())
    assert [unit.rows < 24 for unit in toy.units("attention")] == [True, True, False, False, False]


class Uneven(Widened):
    """Text and picture attend, each to its own: the text's output is of few bytes, the picture's of many."""

    def forward(self, x, text, vec):
        self.runs, self.rows = self.runs + 1, self.rows + len(x)
        text = text + self.text_attn(text)
        return x + self.attn(x + vec) + text.mean(1, keepdim=True)


def test_what_does_not_fit_at_all_leaves_the_others_their_place():
    """The picture's attention saves more for each byte, and is larger than all that is free."""
    model = TextBeside(Uneven, count=0)
    model.blocks = nn.ModuleList(map(Uneven, (64,) * 3))
    for block in model.blocks:
        block.text_attn = Attention()
    sampling = with_free(Sampling(model.requires_grad_(False), (STRATEGIES["broadcast"],)), 3 * TEXT * W * 4 * 2)
    sampling.sample(first_latent(tokens=4 * TEXT))
    assert all(block.text_attn.rows < 24 for block in model.blocks)
    assert [block.attn.rows for block in model.blocks] == [24] * 3
    assert any("3 of 6 attentions fit in" in note for note in sampling.report.notes)


def test_attention_of_the_picture_is_kept_before_that_of_the_text():
    """It is met later here, and saves more for each byte, as it has more keys."""

    class TextFirst(ThreeKindsBlock):
        def forward(self, x, text, vec):
            self.runs += 1
            x = x + self.cross_attn(x + vec, text)
            return x + self.self_attn(x + vec)

    model, latent = TextBeside(TextFirst), first_latent(tokens=4 * IMAGE)
    everywhere = {f"{kind}_attention_timestep_skip_{end}": at for kind in ("spatial", "cross") for end, at in
                  (("start", -1), ("end", 1001))}  # fmt: skip
    strategy = PyramidAttentionBroadcast(cross_attention_block_skip_range=2, **everywhere)
    sampling = with_free(Sampling(model, (strategy,)), 3 * latent.shape[1] * W * 4 * 2)
    sampling.sample(latent)
    steps = 12 * 2
    assert [block.self_attn.rows < steps for block in model.blocks] == [True, True, True]
    assert [block.cross_attn.rows for block in model.blocks] == [steps] * 3


def test_nothing_fits_and_all_is_as_without_a_cache(toy):
    sampling = with_free(Sampling(toy, (STRATEGIES["broadcast"],)), 0.0)
    assert torch.equal(sampling.sample(first_latent()), uncached(Toy(), first_latent()))
    assert sampling.report.bytes_held == 0 and any("0 of 5 attentions fit" in note for note in sampling.report.notes)


class OneFailure(TorchDispatchMode):
    """Memory runs out in the so-manieth operation of PyTorch that makes a tensor; once, or in all that follow."""

    def __init__(self, at, times=1):
        super().__init__()
        self.left, self.times, self.depth = at, times, 0

    def __enter__(self):
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *failure):
        self.depth -= 1
        return super().__exit__(*failure)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.numel() >= 40:  # as large as a latent
            self.left -= 1
            if self.left < 0 and self.times > 0:
                self.times -= 1
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return output


def sampled_under(mode, strategy):
    """A run of a toy in which memory runs out, and the latent that it ends with."""
    sampling = GuidedSampling(Toy(), (strategy,)) if strategy.levels[-1] == "guidance" else Sampling(Toy(), (strategy,))
    own = sampling.run.again

    def again(attempt):  # whatever a run does for a call, and what the model does in it
        def under():
            with mode if mode.depth == 0 else nullcontext():
                return attempt()

        return own(under)

    sampling.run.again = again
    return sampling, sampling.sample(
        first_latent(tokens=60) if isinstance(sampling, GuidedSampling) else first_latent()
    )


@by_strategy
def test_memory_that_runs_out_anywhere_in_a_run_does_not_end_it(name):
    strategy = STRATEGIES[name]
    counting = OneFailure(10**9)
    _, cached = sampled_under(counting, strategy)
    operations = 10**9 - counting.left
    exact = uncached(Toy(), first_latent(tokens=cached.shape[1]))
    most = relative_error(cached, exact)
    for at in range(0, operations, max(operations // 24, 1) | 1):
        mode = OneFailure(at)
        sampling, latent = sampled_under(mode, strategy)
        assert mode.times == 0 and relative_error(latent, exact) <= most + 0.05
        assert sum("memory ran out" in note for note in sampling.report.notes) == 1
        sampling.run.free()
        assert bytes_held([memory.state for memory in sampling.run.state.memories.values()]) == 0


def test_two_strategies_lose_the_one_that_holds_most(toy):
    strategies = (STRATEGIES["output"], STRATEGIES["broadcast"])
    sampling = Sampling(toy, strategies)
    failures = [False, False, False, False, True]

    def fail(*_):
        if failures and failures.pop():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    for index in range(12):
        if index == 3:
            hook = toy.head.register_forward_pre_hook(fail)
        sampling.call_on(first_latent() * (1 - index / 50), index)
    hook.remove()
    assert sampling.run.state.terms.strategies == (STRATEGIES["output"],)
    assert sampling.report.calls[-1].action in ("forecast", "reused") or sampling.report.count("forecast") >= 2


@pytest.mark.parametrize("error", NO_MEMORY_LEFT, ids=lambda error: str(error)[:20])
def test_a_model_that_does_not_fit_by_itself_says_so(toy, error):
    def fail(*_):
        raise error

    toy.head.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=re.escape(str(error))):
        Sampling(toy, (STRATEGIES["first block"],), branches=(POSITIVE,)).call_on(first_latent(), 0)


def test_a_cancel_that_speaks_of_memory_is_a_cancel(toy):
    class Cancelled(Interrupted, MemoryError):
        pass

    def fail(*_):
        raise Cancelled("out of memory")

    toy.head.register_forward_pre_hook(fail)
    sampling = with_cancels(Sampling(toy, (STRATEGIES["broadcast"],), branches=(POSITIVE,)), Interrupted)
    with pytest.raises(Cancelled):
        sampling.call_on(first_latent(), 0)
    assert not sampling.run.state.report.notes
