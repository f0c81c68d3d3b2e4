"""How much work modules do: what is counted in one call is what their layers and attention take."""

import pytest
import torch
from torch import nn
from toy import IMAGE, TEXT, Attention, Sampling, TextBeside, ThreeKindsBlock, Toy, W, first_latent, traces_on

from cache_core.model import Counter, HookRegistry
from cache_core.run.call import ModelCall
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

EVERYWHERE = {"spatial_attention_timestep_skip_start": -1, "spatial_attention_timestep_skip_end": 1001}
STRATEGIES = [PyramidAttentionBroadcast(**EVERYWHERE), TaylorSeerCache(cache_level="block")]


def counted(module, *args, name="mlp", counter=None):
    counter = counter or Counter()
    with HookRegistry(counter.watching({"block": nn.ModuleDict({name: module})}, {})):
        module(*args)
    assert not traces_on(module)
    return counter.operations


def linear(tokens, inputs, outputs):
    return 2 * tokens * inputs * outputs


def test_layers_are_counted_once_for_each_number_they_give():
    assert counted(nn.Linear(5, 7), torch.ones(2, 3, 5)) == linear(6, 5, 7)
    assert counted(nn.Conv2d(4, 8, 3, padding=1, groups=2), torch.ones(2, 4, 6, 6)) == 2 * (2 * 8 * 36) * (2 * 9)
    assert counted(nn.Sequential(nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 5)), torch.ones(1, 3, 5)) == linear(3, 5, 5)


class Fused(nn.Module):
    """A layer that holds another and says of itself what it takes, as adapters do."""

    def __init__(self):
        super().__init__()
        self.in_features, self.base = 5, nn.Linear(5, 7)

    def forward(self, x):
        return self.base(x)


def test_a_layer_around_a_layer_is_counted_once():
    assert counted(Fused(), torch.ones(1, 3, 5)) == linear(3, 5, 7)


@pytest.mark.parametrize("is_seen", [False, True], ids=["told by its tensors", "seen as an operation"])
@pytest.mark.parametrize("name, keys, projected", [("self_attn", IMAGE, IMAGE), ("cross_attn", TEXT, IMAGE + TEXT)])
def test_attention_is_counted_by_its_queries_and_keys(name, keys, projected, is_seen):
    attention, picture, text = Attention(), torch.ones(2, IMAGE, W), torch.ones(2, TEXT, W)
    counter = Counter()
    if is_seen:
        attention.attend = counter.operation
    layers = linear(2 * projected, W, 3 * W) + linear(2 * IMAGE, W, W)
    given = [picture, *([text] if name == "cross_attn" else [])]
    assert counted(attention, *given, name=name, counter=counter) == layers + 4 * 2 * IMAGE * keys * W


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.title)
@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_only_the_first_call_counts(monkeypatch, strategy, layout):
    sampling, compute, after = Sampling(Toy(), (strategy,), layout=layout), ModelCall.compute, []

    def noting(call):
        output = compute(call)
        after.append(call.model.counter.operations)
        return output

    monkeypatch.setattr(ModelCall, "compute", noting)
    sampling.sample(first_latent())
    assert sampling.report.count("reused", "forecast") >= 2
    assert after[0] > 0 and set(after) == {after[0]}


def test_nothing_counts_where_all_is_kept_in_one_place():
    sampling = Sampling(TextBeside(ThreeKindsBlock), (FirstBlockCache(residual_diff_threshold=1.0),))
    sampling.sample(first_latent())
    (known,) = sampling.run.state.models._known.values()
    assert known.counter.operations == 0 and known.is_learned
