"""One module, one block or the whole model as a site: what it returns is kept, copied and put back in its structure."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from toy import NEGATIVE, POSITIVE, C, ReuseAlways, Sampling, Toy, first_latent, relative_error

from cache_core import COMPUTE, CacheRun, Schedule
from cache_core.strategy.forecast import History


def outputs_of(model, level="output", count=4, **settings):
    """The outputs of evaluations of the same inputs, and the sampling that made them."""
    sampling = Sampling(model, (ReuseAlways(level),), branches=(POSITIVE,), **settings)
    return [sampling.call_on(first_latent(), index) for index in range(count)], sampling


def run_of(model, count=3, level="output", latent=None):
    """Whatever the model returns, from evaluations of the same inputs."""
    run = CacheRun((ReuseAlways(level),), Schedule([3.0, 2.0, 1.0, 0.0]))
    latent, outputs = first_latent() if latent is None else latent, []
    for sigma in run.state.terms.schedule.sigmas[:count]:
        run.begin_evaluation()
        outputs.append(run.call_model(model, lambda: model(latent), torch.tensor([sigma]), contexts=[POSITIVE]))
    run.report.close()
    return outputs, run.report


class Returning(nn.Module):
    """Returns what it is told to make of the latent."""

    def __init__(self, make):
        super().__init__()
        self.make, self.runs = make, 0

    def forward(self, latent):
        self.runs += 1
        return self.make(latent)


@dataclass
class PlainOutput:
    sample: torch.Tensor


RETURNED = {
    "tensor": lambda x: x + 1,
    "tuple": lambda x: (x + 1, x + 2),
    "list": lambda x: [x + 1],
    "dict": lambda x: {"sample": x + 1, "scale": 2.5, "name": "x", "nothing": None},
    "nested": lambda x: ({"a": (x, [x + 1])}, None),
    "zero-dimensional": lambda x: (x + 1, x.mean()),
}
NO_TENSOR = {
    "plain dataclass": lambda x: PlainOutput(x + 1),
    "none": lambda x: None,
    "number": lambda x: 5,
    "integers": lambda x: torch.arange(3),
    "empty": lambda x: (),
}


@pytest.mark.parametrize("make", RETURNED.values(), ids=RETURNED)
def test_any_nesting_is_returned_as_it_was(make):
    model = Returning(make)
    outputs, report = run_of(model)
    assert model.runs == 1
    assert report.count("reused") == 2
    for leaf, original in zip(tree_leaves(outputs[2]), tree_leaves(outputs[0]), strict=True):
        assert torch.equal(leaf, original) if isinstance(leaf, torch.Tensor) else leaf == original
    assert type(outputs[2]) is type(outputs[0])


@pytest.mark.parametrize("make", NO_TENSOR.values(), ids=NO_TENSOR)
def test_an_output_without_a_tensor_to_keep_is_computed(make):
    model = Returning(make)
    outputs, report = run_of(model)
    assert model.runs == 3
    assert report.count("computed") == 3
    assert type(outputs[2]) is type(outputs[0])


def test_the_output_class_of_diffusers_is_returned_as_it_was():
    outputs_of_diffusers = pytest.importorskip("diffusers.models.modeling_outputs", reason="needs diffusers' classes")
    model = Returning(lambda x: outputs_of_diffusers.Transformer2DModelOutput(sample=x + 1))
    outputs, _ = run_of(model)
    assert model.runs == 1
    assert isinstance(outputs[2], outputs_of_diffusers.Transformer2DModelOutput)
    assert torch.equal(outputs[2].sample, first_latent() + 1)


def test_the_model_writing_into_what_it_got_back_cannot_spoil_the_cache():
    run = CacheRun((ReuseAlways("output"),), Schedule([4.0, 3.0, 2.0, 1.0, 0.0]))
    model = Returning(lambda x: x + 1)
    for sigma in run.state.terms.schedule.sigmas[:4]:
        run.begin_evaluation()
        output = run.call_model(model, lambda: model(first_latent()), torch.tensor([sigma]), contexts=[POSITIVE])
        assert torch.equal(output, first_latent() + 1)
        output.zero_()
    assert model.runs == 1


@pytest.mark.parametrize("level", ["block", "module"])
def test_blocks_that_write_in_place_cannot_spoil_the_cache(level):
    toy = Toy(in_place=True)
    control = torch.ones(1, 5, 16)
    outputs, _ = outputs_of(toy, level, control=control)
    assert toy.runs_of(level) == len(toy.units(level))  # computed once
    assert torch.equal(outputs[2], outputs[3])


@dataclass(frozen=True)
class GivesItsOwn(ReuseAlways):
    """Hands out the very tensors that it keeps."""

    def around(self, call: Any, state: History) -> Any:
        if call.may_reuse:
            return state.features[0]
        state.add(call.step.time, (yield COMPUTE))


@pytest.mark.parametrize("level", ["output", "model", "block", "module"])
@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_a_strategy_may_hand_out_the_tensors_that_it_keeps(toy, level, layout):
    sampling = Sampling(toy, (GivesItsOwn(level=level),), layout=layout, control=torch.ones(1, 5, 16))
    latents = dict.fromkeys(sampling.branches, first_latent())
    for index in range(4):
        sampling.predict(latents, index)
    kept = [feature.clone() for memory in sampling.run.state.memories.values() for feature in memory.state.features[0]]
    sampling.predict(latents, 4)[POSITIVE].zero_()
    again = [feature for memory in sampling.run.state.memories.values() for feature in memory.state.features[0]]
    assert all(map(torch.equal, kept, again))


def test_tensors_that_are_not_contiguous_are_kept():
    model = Returning(lambda x: x.transpose(1, 2).expand(3, -1, -1))
    outputs, _ = run_of(model)
    assert model.runs == 1
    assert torch.equal(outputs[2], outputs[0])


class FlatTokens(nn.Module):
    """Tokens of the whole batch in one list, without a batch axis."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(C, C) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, latent, sigma, text, control=None):
        tokens = (latent + text.mean(1, keepdim=True)).flatten(0, 1)  # (rows * IMAGE, C)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.unflatten(0, latent.shape[:2])


@pytest.mark.parametrize("level", ["model", "block"])
@pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
def test_tokens_without_a_batch_axis_are_told_apart(level, layout):
    sampling = Sampling(FlatTokens(), (ReuseAlways(level),), layout=layout)
    latents = dict.fromkeys(sampling.branches, first_latent())
    outputs = [sampling.predict(latents, index) for index in range(4)]
    assert sampling.report.count("reused") > 0
    for name in latents:
        assert relative_error(outputs[3][name], outputs[0][name]) < 1e-6


class TokensFirst(FlatTokens):
    """Tokens on the first axis, rows on the second."""

    def forward(self, latent, sigma, text, control=None):
        tokens = (latent + text.mean(1, keepdim=True)).transpose(0, 1)  # (IMAGE, rows, C)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.transpose(0, 1)


@pytest.mark.parametrize("level", ["model", "block"])
@pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
def test_a_batch_axis_that_is_not_the_first_never_mixes_branches(level, layout):
    sampling = Sampling(TokensFirst(), (ReuseAlways(level),), layout=layout)
    latents = dict.fromkeys(sampling.branches, first_latent())
    outputs = [sampling.predict(latents, index) for index in range(5)]
    for name in latents:
        assert relative_error(outputs[4][name], outputs[0][name]) < 1e-6


@pytest.mark.parametrize("level", ["output", "model", "block", "module", "attention"])
def test_branches_that_cannot_be_told_apart_are_one_together(level):
    """Models without rows along the first axis: their features serve only a call for the same branches."""
    toy = Toy()
    run = CacheRun((ReuseAlways(level),), Schedule([3.0, 2.0, 1.0, 0.0]))
    sigma, text = torch.ones(3), torch.zeros(3, 6, C)

    def call(*contexts):
        run.begin_evaluation()
        return run.call_model(toy, lambda: toy(first_latent(3), sigma, text), sigma, contexts)

    outputs = [call(NEGATIVE, POSITIVE) for _ in range(3)]
    assert toy.runs_of(level) == len(toy.units(level))
    torch.testing.assert_close(outputs[2], Toy()(first_latent(3), sigma, text))
    call(POSITIVE, NEGATIVE)
    assert toy.runs_of(level) == 2 * len(toy.units(level))


def test_a_module_that_runs_twice_in_a_call_has_two_sites(toy):
    block = toy.single_blocks[0]
    first = block.attn
    block.mlp = first  # the same module in both places
    toy.embed_sigma.weight.zero_()  # all steps are alike
    outputs, _ = outputs_of(toy, "module")
    torch.testing.assert_close(outputs[3], outputs[0])
    assert first.runs == 2  # computed once at each
