"""Models compiled with torch.compile: reuse happens, results are right, and nothing is compiled again.

What is counted: graphs, by a backend that notes when one is made and when one runs, and graph breaks, by dynamo itself.
"""

from collections import Counter
from functools import partial

import pytest
import torch
from compiling import breaks, counting
from torch import Tensor, nn
from toy import (
    Attention,
    C,
    FeedForward,
    ReuseAlways,
    Sampling,
    W,
    first_latent,
    sigmas_of,
    traces_on,
)

from cache_core import CacheRun, Schedule
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

BLOCK, MODEL = 1, 5  # attentions in a graph
ALONG = [
    FirstBlockCache(residual_diff_threshold=0.3),
    FirstBlockCache(residual_diff_threshold=0.3, max_order=0),
    TaylorSeerCache(cache_interval=3, cache_level="model"),
    TaylorSeerCache(cache_interval=3, cache_level="block"),
]
INSIDE = [TaylorSeerCache(cache_interval=3, cache_level="module"), PyramidAttentionBroadcast()]
AROUND = [
    TaylorSeerCache(cache_interval=3, cache_level="output"),
    FasterCache(spatial_attention_block_skip_range=1),
]


class Uncounted:
    """A part of the toy whose Python does not change from run to run: numbers on a module are compiled in."""

    runs = rows = property(lambda self: 0, lambda self, value: None)


class PlainAttention(Uncounted, Attention):
    def __init__(self) -> None:
        super().__init__()
        self.operation = nn.functional.scaled_dot_product_attention


class PlainFeedForward(Uncounted, FeedForward):
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = PlainAttention(), PlainFeedForward()

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        x += self.attn(x + vec)
        x += self.mlp(x + vec)
        return x


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(W, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class Plain(nn.Module):
    """Embedding, five blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.embed_text, self.embed_sigma = nn.Linear(C, W), nn.Linear(C, W), nn.Linear(2, W)
            self.blocks = nn.ModuleList(Block() for _ in range(5))
            self.head = Head()
        self.requires_grad_(False)

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor, control: Tensor | None = None) -> Tensor:
        x = torch.cat((self.embed_text(text), self.embed(latent)), 1)
        angle = sigma[:, None, None]
        vec = self.embed_sigma(torch.cat((angle.sin(), angle.cos()), -1))
        for block in self.blocks:
            x = block(x, vec)
        return self.head(x[:, text.shape[1] :])


@pytest.fixture
def compiler():
    with counting() as compiler:
        yield compiler


def whole(model, compiler):
    return torch.compile(model, backend=compiler)


def block_by_block(model, compiler):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend=compiler)
    return model


def block_by_block_in_place(model, compiler):
    for block in model.blocks:
        block.compile(backend=compiler)
    return model


def whole_with_blocks(model, compiler):
    return whole(block_by_block(model, compiler), compiler)


WAYS = [whole, block_by_block, block_by_block_in_place, whole_with_blocks]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def sampled(model, strategy):
    sampling = Sampling(model, None if strategy is None else (strategy,), layout="separate")
    return sampling, sampling.sample(first_latent())


def in_words(strategy):
    return f"{type(strategy).__name__}-{strategy.levels[0]}-{getattr(strategy, 'max_order', '')}"


@every_way
@pytest.mark.parametrize("strategy", ALONG, ids=in_words)
def test_blocks_that_are_not_computed_are_left_out_and_the_others_run_compiled(compiler, way, strategy):
    exact = sampled(Plain(), strategy)
    sampling, latent = sampled(way(Plain(), compiler), strategy)
    assert torch.equal(latent, exact[1])
    assert [call.action for call in sampling.report.calls] == [call.action for call in exact[0].report.calls]
    assert sampling.report.count("reused", "forecast") >= 8
    assert sampling.report.blocks == "5 blocks"
    computed = sampling.report.computed_share * 5 * len(sampling.report.calls)
    assert compiler.runs[BLOCK] == pytest.approx(computed) and max(compiler.runs) == BLOCK


@every_way
@pytest.mark.parametrize("strategy", ALONG, ids=in_words)
def test_all_blocks_share_one_graph_and_later_runs_compile_nothing(compiler, way, strategy):
    model = way(Plain(), compiler)
    sampled(model, strategy)
    graphs = compiler.graphs
    assert graphs <= 2  # one for all blocks; a second if the compiler does not take a first tensor for any
    for other in (strategy, *ALONG):
        assert sampled(model, other)[0].report.count("reused", "forecast") >= 8
    assert compiler.graphs == graphs and breaks() == 0


@pytest.mark.parametrize("strategy", AROUND, ids=in_words)
def test_a_strategy_around_the_model_leaves_it_compiled_as_a_whole(compiler, strategy):
    exact, _ = sampled(Plain(), strategy)
    sampling, latent = sampled(whole(Plain(), compiler), strategy)
    assert torch.equal(latent, sampled(Plain(), strategy)[1])
    assert compiler.runs[MODEL] == sampling.report.count("computed") == exact.report.count("computed")
    assert compiler.graphs == 1 and breaks() == 0


@every_way
@pytest.mark.parametrize("strategy", INSIDE, ids=in_words)
def test_a_strategy_inside_blocks_runs_them_as_written_and_says_so(compiler, way, strategy):
    exact = sampled(Plain(), strategy)
    sampling, latent = sampled(way(Plain(), compiler), strategy)
    assert torch.equal(latent, exact[1])
    assert sampling.report.computed_share == exact[0].report.computed_share < 1
    assert "blocks run without torch.compile" in " ".join(sampling.report.notes)
    assert sum(compiler.runs.values()) == 0 == breaks()


@every_way
def test_strategies_of_two_levels_keep_to_what_is_compiled(compiler, way):
    strategies = (FirstBlockCache(residual_diff_threshold=0.3), FasterCache(spatial_attention_block_skip_range=1))
    sampling = Sampling(way(Plain(), compiler), strategies)
    exact = Sampling(Plain(), strategies)
    assert torch.equal(sampling.sample(first_latent()), exact.sample(first_latent()))
    assert compiler.runs[BLOCK] > 0 == breaks()


@every_way
def test_after_a_cached_run_the_model_is_compiled_as_before(compiler, way):
    model = way(Plain(), compiler)
    plain = sampled(model, None)[1]
    runs, graphs, traces = Counter(compiler.runs), compiler.graphs, traces_on(model)
    sampled(model, ALONG[0])
    made = compiler.graphs
    compiler.runs.clear()
    assert torch.equal(sampled(model, None)[1], plain)
    assert compiler.runs == runs and compiler.graphs == made <= graphs + 1
    assert traces_on(model) == traces and breaks() == 0


@every_way
def test_names_of_modules_are_those_of_the_model_that_was_compiled(compiler, way):
    strategy = TaylorSeerCache(cache_level="module", cache_interval=3, cache_identifiers=(r"blocks\.\d\.attn",))
    sampling, _ = sampled(way(Plain(), compiler), strategy)
    assert {site.name for _, _, site in sampling.run.state.memories} == {f"blocks.{index}.attn" for index in range(5)}


def test_a_model_compiled_where_nobody_looks_is_right_and_breaks_once_a_call_at_most(compiler):
    model, text = Plain(), torch.zeros(1, 6, C)
    hidden = whole(model, compiler)
    run, outputs, broken = CacheRun((ReuseAlways(),), Schedule(sigmas_of(6))), [], []
    for level in torch.tensor(sigmas_of(6)[:-1]).split(1):
        run.begin_evaluation()
        before = breaks()
        outputs.append(run.call_model(model, partial(hidden, first_latent(), level, text), level, ["a"]))
        broken.append(breaks() - before)
    run.report.close()
    assert run.report.count("reused") == 5
    assert torch.equal(outputs[0], Plain()(first_latent(), torch.ones(1), text))
    assert max(broken) == 1 and broken[2:] == [0] * 4 and traces_on(model) == []


def test_half_of_the_blocks_may_be_compiled(compiler):
    model = Plain()
    for index in (0, 3):
        model.blocks[index] = torch.compile(model.blocks[index], backend=compiler)
    sampling, latent = sampled(model, ALONG[0])
    assert torch.equal(latent, sampled(Plain(), ALONG[0])[1])
    assert sampling.report.blocks == "5 blocks" and compiler.runs[BLOCK] > 10
