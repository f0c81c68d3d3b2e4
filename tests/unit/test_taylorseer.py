"""TaylorSeer: which steps are computed, what the others are forecast from, and at which modules."""

import pytest
import torch
from torch import nn
from toy import C, Sampling, first_latent, reference, relative_error, sigmas_of, tensors_in, uncached

from cache_core import Schedule
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.forecast import History
from cache_core.strategy.strategy import Site


def sampled(toy, strategy, **settings):
    sampling = Sampling(toy, (strategy,), **settings)
    sampling.result = sampling.sample(first_latent())
    return sampling


def computed_steps(sampling):
    return [call.step.index for call in sampling.report.calls if call.action == "computed"]


@pytest.mark.parametrize("level", ["output", "model", "block", "module"])
@pytest.mark.parametrize("spacing", ["sigma", "steps"])
def test_the_steps_planned_are_the_steps_computed(toy, level, spacing):
    strategy = TaylorSeerCache(cache_level=level, spacing=spacing)
    sampling = sampled(toy, strategy, sigmas=sigmas_of(12, 3.0))
    planned = strategy.computed_steps(sampling.run.state.terms.schedule)
    assert computed_steps(sampling) == sorted(planned)
    assert toy.runs_of(level) == len(computed_steps(sampling)) * len(toy.units(level))


def test_everything_from_a_step_on_can_be_computed(toy):
    sampling = sampled(toy, TaylorSeerCache(disable_cache_after_step=8))
    assert computed_steps(sampling)[-4:] == [8, 9, 10, 11]


def test_a_warm_up_longer_than_the_schedule_computes_all_bit_for_bit(toy):
    sampling = Sampling(toy, (TaylorSeerCache(disable_cache_before_step=50),))
    assert torch.equal(sampling.sample(first_latent()), reference())


@pytest.mark.parametrize("level", ["output", "model", "block", "module"])
def test_a_warm_up_of_none_still_computes_the_first_step(toy, level):
    sampling = sampled(toy, TaylorSeerCache(cache_interval=3, cache_level=level, disable_cache_before_step=0))
    assert sampling.report.calls[0].action == "computed"
    assert sampling.report.count("reused", "forecast") > 6


class Polynomial(nn.Module):
    """Predicts a polynomial of sigma, whatever the latent."""

    def __init__(self, degree):
        super().__init__()
        self.degree, self.runs = degree, 0

    def forward(self, latent, sigma, text, control=None):
        self.runs += 1
        return ((2 * sigma - 0.7) ** self.degree)[:, None, None].expand_as(latent).clone()


@pytest.mark.parametrize("degree", [0, 1])
def test_an_output_on_a_straight_line_is_forecast_exactly(degree):
    model = Polynomial(degree)
    strategy = TaylorSeerCache(max_order=degree, cache_interval=2, spacing="steps")
    sampling = sampled(model, strategy)
    expected = uncached(Polynomial(degree), first_latent())
    torch.testing.assert_close(sampling.result, expected, rtol=1e-5, atol=1e-5)  # twelve float32 additions
    assert model.runs == 7


def test_models_that_add_noise_to_the_picture_are_forecast_too(toy):
    sigmas = [14.6, 9.0, 6.0, 4.0, 2.7, 1.8, 1.2, 0.8, 0.5, 0.3, 0.1, 0.0]
    sampling = Sampling(toy, (TaylorSeerCache(cache_interval=2),), sigmas)
    latents = dict.fromkeys(sampling.branches, first_latent())
    toy.embed_sigma.weight.mul_(0.02)  # smooth over this range
    for index in range(11):
        output = torch.cat(list(sampling.predict(latents, index).values()))
        exact = torch.cat(list(Sampling(toy, None, sigmas).predict(latents, index).values()))
        assert relative_error(output, exact) < 0.05
    assert sampling.report.count("forecast") > 2


@pytest.mark.parametrize("level", ["output", "model", "block", "module"])
def test_outputs_are_stored_in_the_dtype_asked_for(toy, level):
    strategy = TaylorSeerCache(cache_level=level, taylor_factors_dtype=torch.bfloat16)
    sampling = sampled(toy, strategy)
    kept = list(tensors_in(list(sampling.run.state.memories.values())))
    assert kept
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}


@pytest.mark.parametrize("order", range(4))
def test_no_more_outputs_are_kept_than_the_order_needs(toy, order):
    sampling = sampled(toy, TaylorSeerCache(max_order=order, disable_cache_before_step=8))
    assert {len(memory.state.outputs) for memory in sampling.run.state.memories.values()} == {order + 1}


def runs_by_part(toy):
    return {name: module.runs for name, module in toy.named_modules() if hasattr(module, "runs") and name}


def test_by_default_attention_and_feed_forward_are_cached_and_their_blocks_run(toy):
    sampling = sampled(toy, TaylorSeerCache(cache_level="module"))
    computed, runs = len(computed_steps(sampling)), runs_by_part(toy)
    assert computed < 8
    assert {runs[name] for name in runs if name.endswith(("attn", "mlp"))} == {computed}
    assert {block.runs for block in toy.blocks} == {12}


def test_only_modules_asked_for_are_cached(toy):
    sampling = sampled(toy, TaylorSeerCache(cache_level="module", cache_identifiers=(r".*\.attn",)))
    computed, runs = len(computed_steps(sampling)), runs_by_part(toy)
    assert {runs[name] for name in runs if name.endswith("attn")} == {computed}
    assert {runs[name] for name in runs if name.endswith("mlp")} == {12}


def test_modules_to_be_left_alone_always_run(toy):
    sampling = sampled(toy, TaylorSeerCache(cache_level="module", skip_predict_identifiers=(r".*_mlp", r".*\.mlp")))
    computed, runs = len(computed_steps(sampling)), runs_by_part(toy)
    assert {runs[name] for name in runs if name.endswith("attn")} == {computed}
    assert {runs[name] for name in runs if name.endswith("mlp")} == {12}


def test_a_block_whose_modules_are_all_left_alone_always_runs(toy):
    sampled(toy, TaylorSeerCache(cache_level="module", skip_predict_identifiers=(r"double_blocks\.0\..*",)))
    runs = runs_by_part(toy)
    assert {runs[name] for name in runs if name.startswith("double_blocks.0")} == {12}
    assert runs["double_blocks.1.attn"] < 8


def test_identifiers_that_fit_nothing_cache_nothing(toy):
    sampled(toy, TaylorSeerCache(cache_level="module", cache_identifiers=(r".*\.no_such_module",)))
    assert set(runs_by_part(toy).values()) == {12}


class PlainBlock(nn.Module):
    """A block without modules of the usual names."""

    def __init__(self):
        super().__init__()
        self.runs, self.layer = 0, nn.Linear(C, C).requires_grad_(False)

    def forward(self, x, angle):
        self.runs += 1
        return x + 0.3 * torch.tanh(self.layer(x) + angle)


class PlainModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(PlainBlock() for _ in range(3))

    def forward(self, latent, sigma, text, control=None):
        for block in self.layers:
            latent = block(latent, sigma[:, None, None])
        return latent


def test_a_block_without_such_modules_is_cached_whole():
    model = PlainModel()
    sampling = sampled(model, TaylorSeerCache(cache_level="module"))
    assert {block.runs for block in model.layers} == {len(computed_steps(sampling))}
    assert len(computed_steps(sampling)) < 8


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.attn", "transformer_blocks.3.ff", "transformer_blocks.3.ff_context", "blocks.1.attn1",
        "blocks.1.attn2", "blocks.11.ffn", "double_blocks.2.img_attn", "double_blocks.2.txt_mlp", "layers.0.attention",
        "layers.0.feed_forward", "joint_blocks.1.x_block.attn", "joint_blocks.1.context_block.mlp",
        "blocks.0.self_attn", "blocks.0.cross_attn",
    ],
)  # fmt: skip
def test_modules_are_known_by_the_names_models_give_them(name):
    block = ".".join(name.split(".")[:2])
    assert TaylorSeerCache().modules_in(block, [name, f"{block}.norm"]) == [name]


@pytest.mark.parametrize("name", ["blocks.0.norm1", "blocks.0.attn.to_q", "blocks.0.modulation"])
def test_other_modules_are_none_of_its_business(name):
    assert TaylorSeerCache().modules_in("blocks.0", [name, "blocks.0.mlp"]) == ["blocks.0.mlp"]


def test_the_published_forecast_is_worse_from_order_two_up():
    """Not a wish: it is why the recursion is not the default."""
    model, sigmas = Polynomial(2), sigmas_of(20)
    exact = uncached(model, first_latent(), sigmas=sigmas)
    errors = [
        relative_error(
            Sampling(model, (TaylorSeerCache(cache_interval=3, max_order=2, weights=weights),), sigmas).sample(
                first_latent()
            ),
            exact,
        )
        for weights in ("sigma", "recursion")
    ]
    assert errors[0] < errors[1]


def test_a_state_is_new_for_every_branch_and_run():
    strategy = TaylorSeerCache()
    assert isinstance(strategy.new_state(Site("output", "")).outputs, History)
    assert strategy.new_state(Site("output", "")) is not strategy.new_state(Site("output", ""))
    assert strategy.computed_steps(Schedule([1.0])) == ()
