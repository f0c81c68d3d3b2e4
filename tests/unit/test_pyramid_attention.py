"""Pyramid Attention Broadcast: which attentions compute when, what stands in for the others, and what that holds."""

import weakref

import pytest
import torch
from toy import (
    IMAGE,
    POSITIVE,
    TEXT,
    FeedForward,
    OperationsBlock,
    Sampling,
    TextBeside,
    ThreeKindsBlock,
    Toy,
    W,
    alive,
    first_latent,
    reference,
    relative_error,
    reused_by_hand,
    sigmas_of,
    tensors_in,
    through_run,
)

from cache_core import Schedule
from cache_core.strategies.pyramid_attention import KINDS, PyramidAttentionBroadcast
from cache_core.strategy.windows import is_open

MODULES = {"spatial": "self_attn", "temporal": "temporal_attn", "cross": "cross_attn"}
ALWAYS = {
    f"{kind}_attention_timestep_skip_{end}": value for kind in KINDS for end, value in (("start", -1), ("end", 1001))
}
layouts = pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])


def steps_reused(strategy, sigmas, attention=lambda toy: toy.single_blocks[0].attn, model=Toy, **settings):
    """The steps in which this attention did not run."""
    sampling = Sampling(model(), (strategy,), sigmas, branches=(POSITIVE,), **settings)
    reused = []
    for index in range(len(sigmas) - 1):
        before = attention(sampling.toy).runs
        sampling.call_on(first_latent(), index)
        if attention(sampling.toy).runs == before:
            reused.append(index)
    return reused


@pytest.mark.parametrize(
    ("shift", "skip_range", "reused"),
    [  # worked out by hand; even timesteps are 1000, 950, ... 50, those from 750 to 150 lie in the window
        (1.0, 2, [5, 7, 9, 11, 13, 15, 17]),
        (1.0, 3, [5, 6, 8, 9, 11, 12, 14, 15, 17]),
        (1.0, 5, [5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17]),
        # shifted: steps 9 to 19 do, and the last strides are longer than an even step
        (3.0, 2, [9, 11, 13, 15, 17]),  # not 19: 2.3 even steps from 18
        (3.0, 3, [9, 10, 12, 13, 15, 16, 18]),  # not 19: 4.2 even steps from 17
        (3.0, 5, [9, 10, 11, 12, 14, 15, 16, 18, 19]),  # not 17: 5.4 even steps from 13
    ],
)
def test_attention_computes_once_in_so_many_evaluations_and_even_steps(shift, skip_range, reused):
    strategy = PyramidAttentionBroadcast(spatial_attention_block_skip_range=skip_range)
    assert steps_reused(strategy, sigmas_of(20, shift)) == reused


@pytest.mark.parametrize(
    ("start", "end", "inside"),
    [
        (100, 800, range(150, 800, 50)),
        (500, 700, [550, 600, 650]),
        (499, 701, [500, 550, 600, 650, 700]),
        (-1, 1001, range(50, 1000, 50)),  # the first step has nothing to reuse
        (900, 1000, [950]),
        (51, 99, []),
    ],
)
def test_the_ends_of_a_window_are_outside(start, end, inside):
    """Whichever way float32 rounds the sigmas that lie at them."""
    window = dict(spatial_attention_timestep_skip_start=start, spatial_attention_timestep_skip_end=end)
    strategy = PyramidAttentionBroadcast(spatial_attention_block_skip_range=20, **window)
    assert sorted(1000 - 50 * index for index in steps_reused(strategy, sigmas_of(20))) == list(inside)


@pytest.mark.parametrize("steps", [10, 20, 25, 50, 100])
@pytest.mark.parametrize("end", range(100, 1000, 100))
def test_a_step_at_an_end_is_outside_whatever_float32_makes_of_its_sigma(steps, end):
    schedule, name = Schedule(sigmas_of(steps)), "spatial_attention_timestep_skip"
    above = PyramidAttentionBroadcast(
        spatial_attention_timestep_skip_start=end, spatial_attention_timestep_skip_end=1001
    )
    below = PyramidAttentionBroadcast(spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=end)
    found = [schedule.step_at(sigma) for sigma in torch.tensor(schedule.sigmas).tolist()]
    assert [step.index for step in found[:-1] if is_open(above, name, step)] == [
        index for index in range(steps) if 1000 * (steps - index) > end * steps
    ]
    assert [step.index for step in found[:-1] if is_open(below, name, step)] == [
        index for index in range(steps) if 1000 * (steps - index) < end * steps
    ]


def test_each_kind_has_its_own_range_and_window():
    windows = {"spatial": (2, 100, 800), "temporal": (3, 300, 901), "cross": (5, -1, 1001)}
    names = ("block_skip_range", "timestep_skip_start", "timestep_skip_end")
    settings = {
        f"{kind}_attention_{n}": v for kind, values in windows.items() for n, v in zip(names, values, strict=True)
    }
    for kind, window in windows.items():
        reused = steps_reused(
            PyramidAttentionBroadcast(**settings),
            sigmas_of(20),
            attention=lambda model: getattr(model.blocks[1], MODULES[kind]),  # noqa: B023
            model=lambda: TextBeside(ThreeKindsBlock),
        )
        assert reused == reused_by_hand(20, *window)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_are_off_always_run_and_keep_nothing(kind):
    ranges = {f"{other}_attention_block_skip_range": 3 if other == kind else 1 for other in KINDS}
    model = TextBeside(ThreeKindsBlock)
    sampling = Sampling(model, (PyramidAttentionBroadcast(**ranges),), sigmas_of(20))
    sampling.sample(first_latent())
    runs = {other: getattr(model.blocks[0], MODULES[other]).runs for other in KINDS}
    assert runs == {other: 11 if other == kind else 20 for other in KINDS}
    assert {site.kind for _, _, site in sampling.run.state.memories} == {kind}


@pytest.mark.parametrize("skip_range", [2, 3, 4])
def test_of_two_evaluations_in_a_step_as_heun_makes_them_each_counts(toy, skip_range):
    sampling = Sampling(toy, (PyramidAttentionBroadcast(spatial_attention_block_skip_range=skip_range, **ALWAYS),))
    sigmas, computed = [sigma for pair in zip(sampling.sigmas, sampling.sigmas[1:-1]) for sigma in pair], []
    for number, sigma in enumerate(sigmas):
        before = toy.runs_of("attention")
        sampling.run.begin_evaluation()
        sampling.call(dict.fromkeys(sampling.branches, first_latent()), sigma, sampling.branches)
        computed += [number] if toy.runs_of("attention") > before else []
    assert computed == list(range(0, 22, skip_range))


def test_all_else_runs_in_every_step(toy):
    sampling = Sampling(toy, (PyramidAttentionBroadcast(),), sigmas_of(20))
    sampling.sample(first_latent())
    assert toy.runs_of("attention") == 5 * (20 - 7)
    assert {block.runs for block in toy.blocks} == {20}
    assert {part.runs for part in toy.units("module") if isinstance(part, FeedForward)} == {20}


def outputs_of(module):
    """What the module returns from now on: its own outputs and those that stand in."""
    outputs = []
    module.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    return outputs


def test_what_stands_in_is_exactly_the_output_computed_last(toy):
    module = toy.single_blocks[1].attn
    outputs = outputs_of(module)
    reused = {5, 6, 8, 9, 11, 12, 14, 15, 17}
    strategy = PyramidAttentionBroadcast(spatial_attention_block_skip_range=3)
    Sampling(toy, (strategy,), sigmas_of(20)).sample(first_latent())
    for index in range(1, 20):
        assert torch.equal(outputs[index], outputs[index - 1]) == (index in reused)


@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_writing_into_what_stands_in_does_not_spoil_it(toy, layout):
    strategy = PyramidAttentionBroadcast(spatial_attention_block_skip_range=9, **ALWAYS)
    module, seen = toy.single_blocks[1].attn, []

    def spoil(module, args, output):
        seen.append(output.clone())
        return output.zero_()

    module.register_forward_hook(spoil)
    sampling = Sampling(toy, (strategy,), layout=layout, branches=(POSITIVE,))
    for index in range(4):
        sampling.call_on(first_latent(), index)
    assert module.runs == 1
    assert all(torch.equal(output, seen[0]) and output.any() for output in seen)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_output_of_each_attention_and_branch_is_held(toy, layout, dtype):
    sampling = Sampling(toy.to(dtype), (PyramidAttentionBroadcast(),), layout=layout)
    sampling.sample(first_latent().to(dtype))
    attentions, branches = 5, 2
    assert sampling.report.bytes_held == attentions * (TEXT + IMAGE) * W * dtype.itemsize * branches


def test_one_output_of_each_operation_and_branch_is_held():
    strategy = PyramidAttentionBroadcast(cross_attention_block_skip_range=6)
    sampling = Sampling(model := TextBeside(OperationsBlock), (strategy,))
    through_run(model, sampling.run)
    sampling.sample(first_latent())
    operations, branches = 2 * 3, 2
    assert sampling.report.bytes_held == operations * IMAGE * W * 4 * branches


@layouts
def test_free_leaves_nothing(toy, layout):
    always = PyramidAttentionBroadcast(spatial_attention_timestep_skip_start=-1)
    sampling = Sampling(toy, (always,), layout=layout)
    sampling.sample(first_latent())
    kept = [weakref.ref(tensor) for tensor in tensors_in(list(sampling.run.state.memories.values()))]
    assert len(kept) == 2 * 5
    sampling.run.free()
    assert alive(kept) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "end"), [(800, 100), (500, 500), (801, 800)])
def test_a_window_that_no_step_lies_in_is_told_and_nothing_is_reused(toy, kind, start, end):
    name, ranges = f"{kind}_attention_timestep_skip", {f"{other}_attention_block_skip_range": 1 for other in KINDS}
    ranges[f"{kind}_attention_block_skip_range"] = 2
    strategy = PyramidAttentionBroadcast(**ranges, **{f"{name}_start": start, f"{name}_end": end})
    sampling = Sampling(toy, (strategy,), sigmas_of(12))
    assert torch.equal(sampling.sample(first_latent()), Sampling(toy, (), sigmas_of(12)).sample(first_latent()))
    (warning,) = sampling.report.as_dict()["warnings"]
    assert f"{name}_start {start} is not below {name}_end {end}" in warning and "set start to the lower" in warning


def test_a_window_of_what_is_never_reused_contradicts_nothing(toy):
    strategy = PyramidAttentionBroadcast(cross_attention_timestep_skip_start=800, cross_attention_timestep_skip_end=100)
    sampling = Sampling(toy, (strategy,), sigmas_of(12))
    sampling.sample(first_latent())
    assert sampling.report.count("reused") > 0 and not strategy.contradiction


def test_reused_attention_is_told_in_the_report(toy):
    sampling = Sampling(toy, (PyramidAttentionBroadcast(),), sigmas_of(20))
    result = sampling.sample(first_latent())
    assert [call.step.index for call in sampling.report.calls if call.action == "reused"] == [5, 7, 9, 11, 13, 15, 17]
    reasons = [call.reason for call in sampling.report.calls]
    assert reasons[0] == "learning the model's blocks"
    assert set(reasons[1:5]) == set(reasons[18:]) == {"outside the timesteps of spatial attention"}
    assert reasons[5] == "spatial attention is computed once in 2 steps"
    assert reasons[6] == "spatial attention was reused in 1 step"
    assert relative_error(result, reference()) < 0.1  # of twelve steps, another result but a near one
