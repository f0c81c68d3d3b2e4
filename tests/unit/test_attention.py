"""Attention as a site: of which kind it is, as a module, and as an operation of a block that has no module for it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from toy import (
    NEGATIVE,
    POSITIVE,
    TEXTS,
    Attention,
    Operation,
    OperationsBlock,
    ReuseAlways,
    Sampling,
    TextBeside,
    ThreeKindsBlock,
    Toy,
    W,
    differing,
    first_latent,
    relative_error,
    side_by_side,
    through_run,
)

from cache_core.model.attention import is_attention, kind_of
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategy.strategy import Site

KINDS = {
    "blocks.0.self_attn": "spatial",  # Wan, Cosmos
    "blocks.0.cross_attn": "cross",
    "transformer_blocks.3.attn": "spatial",  # Qwen-Image, Flux
    "transformer_blocks.0.attn1": "spatial",  # LTX, PixArt
    "transformer_blocks.0.attn2": "cross",
    "transformer_blocks.0.audio_attn1": "spatial",  # LTX-2
    "transformer_blocks.0.audio_attn2": "cross",
    "transformer_blocks.0.audio_to_video_attn": "cross",
    "transformer_blocks.0.video_to_audio_attn": "cross",
    "temporal_transformer_blocks.0.attn1": "temporal",  # Latte
    "temporal_transformer_blocks.0.attn2": "cross",
    "blocks.0.temporal_attn": "temporal",
    "visual_transformer_blocks.0.self_attention": "spatial",  # Kandinsky 5
    "visual_transformer_blocks.0.cross_attention": "cross",
    "transformer_blocks.3.attention": "spatial",
    "layers.3.attention": "spatial",  # Z-Image, Lumina 2
    "joint_blocks.0.x_block.attn": "spatial",  # Stable Diffusion 3
    "double_blocks.0.img_attn": "spatial",
}
NO_ATTENTION = [
    "",
    "blocks.0",
    "blocks.0.ffn",
    "blocks.3.self_attn.q",
    "transformer_blocks.0.attn.to_out.0",
    "layers.0.attention_norm1",
    "transformer_blocks.0.audio_to_video_norm",
    "blocks.0.layer_norm_self_attn",  # Cosmos-Predict2
    "blocks.0.layer_norm_cross_attn",
    "blocks.0.adaln_modulation_self_attn",
    "blocks.0.adaln_modulation_cross_attn",
    "blocks.0.norm_self_attn",  # Anima
    "pixel_blocks.0.compress_to_attn",  # PixelDiT
    "pixel_blocks.0.expand_from_attn",
]
SPATIAL, CROSS, TEMPORAL = (
    PyramidAttentionBroadcast(
        **{
            f"{other}_attention_block_skip_range": 2 if other == kind else 1
            for other in ("spatial", "cross", "temporal")
        },
        **{f"{kind}_attention_timestep_skip_end": 1001},
    )
    for kind in ("spatial", "cross", "temporal")
)
layouts = pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])


def evaluations(sampling, count=4):
    """The outputs of evaluations of the same latents."""
    latents = dict.fromkeys(sampling.branches, first_latent())
    return [torch.cat(list(sampling.predict(latents, index).values())) for index in range(count)]


def with_operations(model, strategy, **settings):
    """A sampling of a model whose attention operations go through the run."""
    sampling = Sampling(model, (strategy,), **settings)
    through_run(model, sampling.run)
    return sampling


def without_steps(model):
    """All its steps are alike."""
    model.embed_sigma.weight.zero_()
    return model


def sites(sampling):
    return {site for _, _, site in sampling.run.state.memories}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_attention_and_its_kind_are_told_by_the_name(name, kind):
    assert is_attention(name)
    assert kind_of(name) == kind


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_what_only_sounds_like_attention_is_none(name):
    assert not is_attention(name)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("says", [True, False])
def test_a_module_that_says_whether_it_is_cross_attention_is_believed(name, says):
    module = nn.Module()
    module.is_cross_attention = says
    assert (kind_of(name, module) == "cross") is says


@layouts
def test_attention_modules_are_sites(layout):
    toy = without_steps(Toy())
    sampling = Sampling(toy, (ReuseAlways("attention"),), layout=layout)
    outputs = evaluations(sampling)
    names = [
        f"{part}.{index}.attn" for part, count in (("double_blocks", 2), ("single_blocks", 3)) for index in range(count)
    ]
    assert sites(sampling) == {Site("attention", name, kind="spatial") for name in names}
    assert [block.attn.rows for block in toy.blocks] == [2] * 5  # each branch once
    assert [block.rows for block in toy.blocks] == [2 * 4] * 5
    assert all(relative_error(output, outputs[0]) < 1e-6 for output in outputs)


@pytest.mark.parametrize("make", [Toy, lambda: TextBeside(OperationsBlock)], ids=["modules", "operations"])
@layouts
def test_what_the_first_evaluation_computed_serves_the_second(make, layout):
    sampling = with_operations(make(), ReuseAlways("attention"), layout=layout)
    evaluations(sampling, 2)
    calls = [[call for call in sampling.report.calls if call.step.index == index] for index in (0, 1)]
    assert {call.action for call in calls[0]} == {"computed"}
    assert {call.action for call in calls[1]} == {"reused"}
    assert [call.computed_share for call in calls[1]] == [0.0] * len(calls[1])


@layouts
def test_operations_of_a_block_without_attention_modules_are_sites(layout):
    model = without_steps(TextBeside(OperationsBlock))
    sampling = with_operations(model, ReuseAlways("attention"), layout=layout)
    outputs = evaluations(sampling)
    expected = [(f"blocks.{index}", turn, kind) for index in range(3) for turn, kind in enumerate(("spatial", "cross"))]
    assert sites(sampling) == {Site("attention", name, turn, kind) for name, turn, kind in expected}
    assert [(block.itself.rows, block.text.rows) for block in model.blocks] == [(2, 2)] * 3
    assert all(relative_error(output, outputs[0]) < 1e-6 for output in outputs)


@pytest.mark.parametrize(("strategy", "ran"), [(SPATIAL, (6, 12)), (CROSS, (12, 6)), (TEMPORAL, (12, 12))])
def test_an_operation_on_other_tokens_is_cross_attention(strategy, ran):
    model = TextBeside(OperationsBlock)
    with_operations(model, strategy, sigmas=[1 - 0.01 * index for index in range(13)]).sample(first_latent())
    assert [(block.itself.runs, block.text.runs) for block in model.blocks] == [ran] * 3


def test_an_operation_inside_an_attention_module_that_is_a_site_is_none_itself(toy):
    sampling = with_operations(toy, ReuseAlways("attention"))
    evaluations(sampling)
    assert {site.name.rpartition(".")[2] for site in sites(sampling)} == {"attn"}
    assert [(block.attn.runs, block.attn.operation.runs) for block in toy.blocks] == [(1, 1)] * 5


@pytest.mark.parametrize("strategy", [SPATIAL, CROSS, TEMPORAL], ids=["spatial", "cross", "temporal"])
@pytest.mark.parametrize("with_module_operations", [False, True], ids=["modules", "modules-and-operations"])
def test_attention_of_a_kind_that_is_off_always_runs(strategy, with_module_operations):
    """Even where cross-attention's text has as many tokens as the picture, and so looks like self-attention."""
    model, texts = TextBeside(ThreeKindsBlock), {name: text.repeat(1, 2, 1)[:, :10] for name, text in TEXTS.items()}
    sampling = Sampling(model, (strategy,), texts=texts)
    if with_module_operations:
        through_run(model, sampling.run)
    evaluations(sampling)
    kinds = {"spatial": "self_attn", "temporal": "temporal_attn", "cross": "cross_attn"}
    for block in model.blocks:
        for kind, name in kinds.items():
            is_on = getattr(strategy, f"{kind}_attention_block_skip_range") > 1
            assert getattr(block, name).operation.runs == (2 if is_on else 4)
    assert {site.kind for site in sites(sampling)} == {
        kind for kind in kinds if getattr(strategy, f"{kind}_attention_block_skip_range") > 1
    }


def test_operations_outside_the_blocks_always_run():
    model = TextBeside(OperationsBlock)
    evaluations(with_operations(model, ReuseAlways("attention")))
    assert model.blocks[0].itself.runs == 1
    assert model.last.runs == 4


def test_an_operation_outside_any_model_call_just_runs():
    model, operation = TextBeside(OperationsBlock), Operation()
    sampling = with_operations(model, ReuseAlways("attention"))
    evaluations(sampling)
    tokens = torch.randn(3, 1, 5, W)
    outputs = [sampling.run.call_attention(operation, *tokens) for _ in range(3)]
    assert operation.runs == 3
    assert all(torch.equal(output, nn.functional.scaled_dot_product_attention(*tokens)) for output in outputs)


@pytest.mark.parametrize("block", [ThreeKindsBlock, OperationsBlock])
def test_text_refiners_stay_live_and_what_was_kept_of_them_is_dropped(block):
    model, texts = TextBeside(block, refiners=2), {name: text[:, :2] for name, text in TEXTS.items()}
    sampling = with_operations(model, ReuseAlways("attention"), texts=texts)
    evaluations(sampling)
    operations = [module.operation for module in model.refiners.modules() if isinstance(module, Attention)]
    operations += [
        operation for each in model.refiners for operation in vars(each).values() if isinstance(operation, Operation)
    ]
    assert operations
    assert [operation.runs for operation in operations] == [4] * len(operations)
    assert sites(sampling)
    assert all(site.name.startswith("blocks.") for site in sites(sampling))
    assert any("refiners always runs" in note for note in sampling.report.notes)


@dataclass(frozen=True)
class FirstBlockOnly(ReuseAlways):
    """Does not step in at most of the attentions."""

    def steps_in_at(self, site):
        return ".0" in site.name


@pytest.mark.parametrize("block", [ThreeKindsBlock, OperationsBlock])
def test_where_a_strategy_does_not_step_in_nothing_is_kept(block):
    model = TextBeside(block)
    sampling = with_operations(model, FirstBlockOnly("attention"))
    evaluations(sampling)
    assert {site.name.split(".")[1] for site in sites(sampling)} == {"0"}
    assert sampling.report.calls[-1].computed_share == 0.0  # of the sites there are


BRANCHING = [
    PyramidAttentionBroadcast(spatial_attention_timestep_skip_end=1001, cross_attention_block_skip_range=3),
    FasterCache(spatial_attention_timestep_skip_end=1001),
]


@pytest.mark.parametrize("strategy", BRANCHING, ids=lambda strategy: strategy.title)
@pytest.mark.parametrize("block", [ThreeKindsBlock, OperationsBlock])
@layouts
def test_each_branch_is_what_it_is_alone_with_the_same_cache(strategy, block, layout):
    latents = differing(first_latent())
    together = side_by_side(with_operations(TextBeside(block), strategy, layout=layout), latents)
    for name, latent in latents.items():
        sampling = with_operations(TextBeside(block), strategy, branches=(name,))
        alone = side_by_side(sampling, {name: latent})[name]
        exact = side_by_side(Sampling(TextBeside(block), None, branches=(name,)), {name: latent})[name]
        assert sampling.report.count("reused", "forecast") > 3
        assert relative_error(together[name], alone) < 1e-5 < relative_error(alone, exact)
    assert relative_error(together[NEGATIVE], together[POSITIVE]) > 1
