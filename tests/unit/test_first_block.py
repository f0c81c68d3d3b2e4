"""First Block Cache: the test of the first block, and what follows from it."""

import math

import pytest
import torch
from torch import nn
from toy import POSITIVE, C, Sampling, Toy, first_latent, reference, relative_error, sigmas_of, uncached

from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategy.tensors import copied, relative_change, sampled_tokens


def decisions(sampling):
    return "".join("c" if call.action == "computed" else "r" for call in sampling.report.calls)


@pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
def test_a_threshold_next_to_zero_is_bit_exact(toy, layout):
    sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=1e-9),), layout=layout)
    assert torch.equal(sampling.sample(first_latent()), uncached(Toy(), first_latent(), layout=layout))
    assert sampling.report.count("reused", "forecast") == 0


@pytest.mark.parametrize("max_order", range(4))
def test_a_higher_threshold_reuses_more(max_order):
    runs = []
    for threshold in (0.01, 0.1, 0.5):
        toy = Toy()
        Sampling(toy, (FirstBlockCache(residual_diff_threshold=threshold, max_order=max_order),)).sample(first_latent())
        runs.append(toy.runs_of("block"))
    assert runs == sorted(runs, reverse=True)
    assert runs[0] > runs[-1]


def test_the_first_block_always_runs_and_the_others_only_when_computed(toy):
    sampling = Sampling(toy, (FirstBlockCache(),))
    sampling.sample(first_latent())
    computed = sampling.report.count("computed")
    assert [block.runs for block in toy.blocks] == [12, *[computed] * 4]
    assert computed < 8


def test_a_straight_line_is_closer_than_plain_reuse():
    exact, errors = reference(), []
    for max_order in (0, 1):
        strategy = FirstBlockCache(residual_diff_threshold=1.0, max_order=max_order, max_consecutive_cache_hits=2)
        sampling = Sampling(Toy(), (strategy,))
        errors.append(relative_error(sampling.sample(first_latent()), exact))
        assert decisions(sampling) == "crrcrrcrrcrr"
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("hits", [1, 2, 3])
def test_no_more_are_reused_in_a_row_than_allowed(toy, hits):
    sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=1.0, max_consecutive_cache_hits=hits),))
    sampling.sample(first_latent())
    assert max(map(len, decisions(sampling).split("c"))) == hits
    assert any(call.reason == f"{hits} reused in a row" for call in sampling.report.calls)


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.0), (0.0, 0.5), (0.3, 0.6)])
def test_only_the_share_asked_for_is_reused(toy, start, end):
    strategy = FirstBlockCache(residual_diff_threshold=1.0, start_percent=start, end_percent=end)
    toy.embed_sigma.weight.mul_(0.1)  # a calm model: its changes never add up to the threshold
    sampling = Sampling(toy, (strategy,))
    sampling.sample(first_latent())
    reused = [call.step.index for call in sampling.report.calls if call.action != "computed"]
    assert reused == [index for index in range(1, 12) if start * 12 <= index <= end * 12]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_order", [0, 1])
def test_a_latent_that_is_not_a_number_is_computed(toy, value, max_order):
    sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=1.0, max_order=max_order),))
    latent = first_latent()
    latent[0, 0, 0] = value
    for index in range(6):
        sampling.predict(dict.fromkeys(sampling.branches, latent), index)
    assert decisions(sampling) == "cccccc"


def test_one_bad_call_between_good_ones_is_computed_and_forgotten(toy):
    strategy = FirstBlockCache(residual_diff_threshold=1.0, max_order=0)
    sampling = Sampling(toy, (strategy,), branches=(POSITIVE,))
    outputs = [
        sampling.call_on(first_latent() * (math.nan if index == 3 else 1 + index / 50), index) for index in range(7)
    ]
    assert decisions(sampling) == "crrccrr"
    assert not any(output.isnan().any() for index, output in enumerate(outputs) if index != 3)


@pytest.mark.parametrize("max_order", [0, 1])
def test_no_change_at_all_is_computed(toy, max_order):
    toy.embed_sigma.weight.zero_()  # all steps are alike
    sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=1.0, max_order=0),))
    for index in range(5):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent()), index)
    assert decisions(sampling) == "ccccc"


class ZeroFirst(nn.Module):
    """Its first block adds nothing, so that nothing can be said of its change."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(C, C) for _ in range(3)).requires_grad_(False)
        self.blocks[0].weight.copy_(torch.eye(C))
        self.blocks[0].bias.zero_()

    def forward(self, latent, sigma, text, control=None):
        for block in self.blocks:
            latent = block(latent)
        return latent


def test_a_first_block_that_adds_nothing_is_computed():
    sampling = Sampling(ZeroFirst(), (FirstBlockCache(residual_diff_threshold=1.0),))
    for index in range(5):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent() * (index + 1)), index)
    assert decisions(sampling) == "ccccc"


def test_a_jump_is_computed(toy):
    sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=0.2),), branches=(POSITIVE,))
    for index in range(6):
        sampling.call_on(first_latent() * (20 if index >= 4 else 1), index)
    assert "r" in decisions(sampling)[:4]
    assert decisions(sampling)[4] == "c"


def test_a_batch_is_as_changed_as_its_most_changed_row():
    before = torch.ones(3, 4, 2)
    now = before.clone()
    now[1] += 0.3
    assert relative_change(now, before).item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [(1.5, 1.0, 0.5), (0.0, 2.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, math.inf), (0.0, 0.0, math.nan)],
)
@pytest.mark.parametrize("shape", [(2, 5, 3), (5, 3), (7,)])
def test_relative_change_by_hand(now, before, expected, shape):
    change = relative_change(torch.full(shape, now), torch.full(shape, before)).item()
    assert change == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("shape", [(2, 3, 40, 50, 8), (1, 24, 30, 52, 4), (2, 64, 64, 8), (32760, 16)], ids=str)
def test_features_of_any_dimensions_are_thinned(shape):
    features = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    kept = sampled_tokens(features)
    tokens = features.reshape(len(features) if len(shape) > 2 else 1, -1, shape[-1])
    stride = tokens.shape[1] // 1024
    expected = tokens[:, ::stride] if len(shape) > 2 else tokens[0, ::stride][: tokens.shape[1] // stride // 12 * 12]
    assert torch.equal(kept, expected)
    assert torch.equal(sampled_tokens(features.transpose(1, -2).transpose(1, -2)), expected)
    elsewhere = features.transpose(1, -2) if len(shape) > 3 else features
    assert sampled_tokens(elsewhere)[..., :1].unique().numel() == kept[..., :1].numel()


@pytest.mark.parametrize("tokens", [1, 1024, 2047, 2048, 5000])
def test_about_a_thousand_tokens_are_kept_to_compare(tokens):
    (kept,) = copied([sampled_tokens(torch.arange(2.0 * tokens).reshape(2, tokens, 1))])
    assert min(tokens, 1024) <= kept.shape[1] < 2048
    assert kept[0, -1] >= 0.99 * (tokens - 1)  # spread over all of them
    assert kept.untyped_storage().nbytes() == kept.nbytes  # nothing of the rest is held


def test_changes_add_up_over_reused_calls(toy):
    sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=0.1, max_order=0),), branches=(POSITIVE,))
    for index in range(12):
        sampling.call_on(first_latent(), index)
    measures, in_a_row = [call.measure or 0 for call in sampling.report.calls], 0.0
    for call, measure in zip(sampling.report.calls, measures, strict=True):
        in_a_row = 0.0 if call.action == "computed" else in_a_row + measure
        assert in_a_row < 0.1
    assert "r" in decisions(sampling)


def test_rows_do_not_depend_on_the_pictures_beside_them(toy):
    strategy = FirstBlockCache(residual_diff_threshold=0.1)
    latents = torch.cat((first_latent(seed=1), first_latent(seed=2)))
    sampling = Sampling(toy, (strategy,))
    together = sampling.sample(latents)
    assert sampling.report.count("reused", "forecast") > 0
    assert relative_error(together, uncached(Toy(), latents)) < 0.05


def test_a_shifted_schedule_reuses_too(toy):
    sampling = Sampling(toy, (FirstBlockCache(),), sigmas_of(12, shift=3.0))
    exact = uncached(Toy(), first_latent(), sigmas=sigmas_of(12, shift=3.0))
    assert relative_error(sampling.sample(first_latent()), exact) < 0.05
    assert toy.runs_of("block") < 0.7 * 12 * 5
