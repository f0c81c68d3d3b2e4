"""TorchCompileModel's wrapper beside a cache node, in both orders: whole model, and named blocks.

The backend counts graphs and their runs; graph breaks are counted by dynamo.
"""

import pytest
import torch
from compiling import breaks, counting

from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPT = "a big red ball at the center on a blue striped background"
BLOCKS = 6  # two double, four single: a graph for each of the two kinds
FIRST_BLOCK = FirstBlockCache(residual_diff_threshold=0.4)
STACK = TaylorSeerCache(cache_interval=3, cache_level="model", few_steps="draft")
OUTPUT = TaylorSeerCache(cache_interval=3, few_steps="draft")
EACH_BLOCK = TaylorSeerCache(cache_interval=3, cache_level="block", few_steps="draft")
ATTENTION = PyramidAttentionBroadcast(few_steps="draft")


@pytest.fixture
def compiler(comfy, monkeypatch):
    import comfy.ldm.flux.math
    from comfy.ldm.modules.attention import attention_pytorch

    # What ComfyUI takes on a CPU asks for free memory, which breaks graphs at every attention, with or without a cache.
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention_pytorch)
    with counting() as compiler:
        yield compiler


@pytest.fixture
def compiled(compiler):
    """A MODEL as TorchCompileModel makes it of another; `keys` are those of the nodes that compile block by block."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    def compile_model(model, keys=None):
        patched = model.clone()
        options = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(patched, backend=compiler, options=options, keys=keys)
        return patched

    return compile_model


@pytest.fixture
def sampled(demo, reports, compiled):
    """Samples the demo with a cache before or after the compile node, or without one of them."""
    from cache_core.adapters.comfyui import with_cache

    def sample(strategy=None, order="compiled first", keys=None):
        model = demo.model()
        for part in order.split() if order != "never compiled" else ["first"]:
            if part == "compiled":
                model = compiled(model, keys)
            elif part in ("first", "cached") and strategy is not None:
                model = with_cache(model, strategy, watch=reports.watch)
        latent = demo.sample(model, [PROMPT], steps=8)
        return latent, reports.all[-1] if strategy is not None else None

    return sample


def keys_of(model):
    network = model.model.diffusion_model
    lists = ("double_blocks", "single_blocks")
    return [f"diffusion_model.{name}.{index}" for name in lists for index in range(len(getattr(network, name)))]


ORDERS = ["compiled cached", "cached compiled"]
every_order = pytest.mark.parametrize("order", ORDERS)


@every_order
@pytest.mark.parametrize("blockwise", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize(
    "strategy",
    [FIRST_BLOCK, pytest.param(STACK, marks=pytest.mark.long), pytest.param(EACH_BLOCK, marks=pytest.mark.long)],
    ids=["first block", "stack", "each block"],
)
def test_a_cache_and_a_compiled_model_work_in_both_orders(demo, compiler, sampled, order, blockwise, strategy):
    keys = keys_of(demo.model()) if blockwise else None
    expected, without = sampled(strategy, "never compiled")
    latent, report = sampled(strategy, order, keys)
    assert torch.equal(latent, expected)
    assert [call.action for call in report.calls] == [call.action for call in without.calls]
    assert report.count("reused", "forecast") >= 2 and report.blocks == "2 double_blocks + 4 single_blocks"
    computed = report.computed_share * BLOCKS * len(report.calls)
    assert compiler.runs == {1: pytest.approx(computed)}  # each block that ran, ran compiled, on its own
    graphs = compiler.graphs
    again, _ = sampled(strategy, order, keys)
    assert torch.equal(again, expected)
    assert compiler.graphs == graphs == 2 and breaks() == 0


@every_order
def test_a_forecast_of_the_output_leaves_the_model_compiled_as_a_whole(compiler, sampled, order):
    expected, _ = sampled(OUTPUT, "never compiled")
    latent, report = sampled(OUTPUT, order)
    assert torch.equal(latent, expected)
    assert compiler.runs == {BLOCKS: report.count("computed")} and report.count("forecast") >= 2
    graphs = compiler.graphs
    sampled(OUTPUT, order)
    assert compiler.graphs == graphs and breaks() == 0


@every_order
def test_attention_inside_blocks_is_reused_and_the_report_says_that_they_are_not_compiled(compiler, sampled, order):
    expected, _ = sampled(ATTENTION, "never compiled")
    latent, report = sampled(ATTENTION, order)
    assert torch.equal(latent, expected)
    assert report.count("reused") >= 2 and "without torch.compile" in " ".join(report.notes)
    assert not compiler.runs and breaks() == 0


@every_order
def test_without_the_cache_the_model_is_compiled_as_before(demo, compiler, sampled, order):
    plain, _ = sampled(None, "compiled")
    calls = compiler.runs[BLOCKS]
    sampled(FIRST_BLOCK, order)
    graphs = compiler.graphs
    assert torch.equal(sampled(None, "compiled")[0], plain)
    assert compiler.runs[BLOCKS] == 2 * calls > 0 and compiler.graphs == graphs
    assert not any("forward" in vars(module) for module in demo.model().model.diffusion_model.modules())
