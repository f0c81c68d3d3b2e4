"""Weights that are cast, dequantised, patched or fetched when a layer runs: for blocks that are left out, none is."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from zoo import all_architectures
from zoo.architecture import is_older

from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPT = "a big red ball at the center on a blue striped background"
BLOCKS = [f"double_blocks.{index}" for index in range(2)] + [f"single_blocks.{index}" for index in range(4)]
STRATEGIES = [
    FirstBlockCache(residual_diff_threshold=0.3),
    TaylorSeerCache(cache_interval=3, cache_level="output"),
    TaylorSeerCache(cache_interval=3, cache_level="model"),
    TaylorSeerCache(cache_interval=3, cache_level="block"),
]
OFF = [TaylorSeerCache(cache_interval=1), FirstBlockCache(residual_diff_threshold=1e-9)]  # the latter is never met
by_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.title}, {s.levels[0]}")


def block_of(name):
    """The block that a module is in; the empty text outside of all."""
    return next((block for block in BLOCKS if name.startswith(f"{block}.")), "")


@pytest.fixture
def casts(comfy, monkeypatch):
    """How often ComfyUI cast a layer's weights, by block: pass a model, then read the counts."""
    import comfy.ops

    counts, places, own = Counter(), {}, comfy.ops.cast_bias_weight

    def cast(layer, *args, **kwargs):
        counts[places.get(id(layer), "")] += 1
        return own(layer, *args, **kwargs)

    def of(model):
        places.update({id(m): block_of(name) for name, m in model.model.diffusion_model.named_modules()})
        counts.clear()
        return counts

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    return of


@pytest.fixture
def runs(demo, monkeypatch):
    """How often each block of a model ran, in its class's own forward: pass a model, then read the counts."""
    counts, places = Counter(), {}

    def count_in(block_class):
        own = block_class.forward

        def forward(self, *args, **kwargs):
            counts[places.get(id(self))] += 1
            return own(self, *args, **kwargs)

        monkeypatch.setattr(block_class, "forward", forward)

    network = demo.model().model.diffusion_model
    for block_class in {type(network.double_blocks[0]), type(network.single_blocks[0])}:
        count_in(block_class)

    def of(model):
        blocks = dict(model.model.diffusion_model.named_modules())
        places.update({id(blocks[name]): name for name in BLOCKS})
        counts.clear()
        return counts

    return of


def few_resident(monkeypatch, comfy):
    """ComfyUI keeps no layer's weights on the device, as with --novram: each is cast when it runs."""
    patcher = comfy.model_patcher.ModelPatcher
    own = patcher.partially_load

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        return own(self, device_to, 0.1, force_patch_weights)

    monkeypatch.setattr(patcher, "partially_load", partially_load)


def weights_of(demo):
    return {name: value.clone() for name, value in demo.model().model.diffusion_model.state_dict().items()}


def loaded(comfy, weights, **options):
    if is_older():
        pytest.skip("this ComfyUI takes every Flux to have 24 heads, and can't load the demo's in this form")
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)
    assert model is not None
    return model


def resident_nowhere(demo, comfy, monkeypatch):
    from cache_core.adapters.comfyui.demo import load_model

    few_resident(monkeypatch, comfy)
    return load_model()


def resident_nowhere_with_a_lora(demo, comfy, monkeypatch):
    model = resident_nowhere(demo, comfy, monkeypatch)
    generator = torch.Generator().manual_seed(3)
    weights = {name: value for name, value in model.model.state_dict().items() if name.endswith(".qkv.weight")}
    changes = {name: (0.002 * torch.randn(value.shape, generator=generator),) for name, value in weights.items()}
    clone = model.clone()
    assert clone.add_patches(changes, 1.0)
    return clone


def in_fp8(demo, comfy, monkeypatch):
    """Weights in 8 bits, cast to what is computed in whenever a layer runs."""
    return loaded(comfy, weights_of(demo), dtype=torch.float8_e4m3fn)


def quantised(kind):
    """ComfyUI's quantised layers, some in each block."""

    def build(demo, comfy, monkeypatch):
        weights = weights_of(demo)
        for name in [
            name for name in weights if name.endswith(".weight") and block_of(name) and weights[name].ndim == 2
        ]:
            largest, storage = {"float8_e4m3fn": (448.0, torch.float8_e4m3fn), "int8_tensorwise": (127.0, torch.int8)}[
                kind
            ]
            scale = weights[name].abs().max() / largest
            small = weights[name] / scale
            weights[name] = (small.round() if storage is torch.int8 else small).to(storage)
            layer = name.removesuffix(".weight")
            weights[f"{layer}.weight_scale"] = scale
            weights[f"{layer}.comfy_quant"] = torch.tensor(
                list(json.dumps({"format": kind}).encode()), dtype=torch.uint8
            )
        model = loaded(comfy, weights)
        assert type(model.model.diffusion_model.single_blocks[0].linear1.weight.data).__name__ == "QuantizedTensor"
        return model

    return build


def in_layers_of_ones_own(demo, comfy, monkeypatch):
    """As packs for GGUF do it: a Linear of their own that keeps its weight packed, and unpacks it when it runs."""
    import comfy.ops

    class Packed(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def _load_from_state_dict(self, weights, prefix, *args):
                weight = weights[f"{prefix}weight"]
                self.scale = weight.abs().max() / 127
                self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
                self.bias = torch.nn.Parameter(weights[f"{prefix}bias"]) if f"{prefix}bias" in weights else None

            def forward_comfy_cast_weights(self, input):
                weight, bias = comfy.ops.cast_bias_weight(self, input)
                return torch.nn.functional.linear(input, weight * self.scale, bias)

    model = loaded(comfy, weights_of(demo), custom_operations=Packed)
    assert model.model.diffusion_model.single_blocks[0].linear1.weight.dtype is torch.int8
    return model


MODELS = {
    "resident nowhere": resident_nowhere,
    "resident nowhere, with a LoRA": resident_nowhere_with_a_lora,
    "fp8": in_fp8,
    "quantised to fp8": quantised("float8_e4m3fn"),
    "quantised to int8": quantised("int8_tensorwise"),
    "packed in layers of one's own": in_layers_of_ones_own,
}


@by_strategy
@pytest.mark.parametrize("kind", MODELS)
def test_blocks_that_are_left_out_have_no_weights_cast(
    demo, comfy, cached, reports, casts, runs, monkeypatch, kind, strategy
):
    model = MODELS[kind](demo, comfy, monkeypatch)
    count, ran = casts(model), runs(model)
    plain = demo.sample(model, [PROMPT], steps=1)
    for_one_run = dict(count)
    assert all(for_one_run[block] >= 3 for block in BLOCKS)

    count.clear(), ran.clear()
    latent = demo.sample(cached(model, strategy), [PROMPT], steps=12)

    assert torch.isfinite(plain).all() and torch.isfinite(latent).all()
    assert reports.all[-1].count("reused", "forecast") >= 4
    assert 12 > ran[BLOCKS[-1]] >= 4
    assert {block: count[block] for block in BLOCKS} == {block: for_one_run[block] * ran[block] for block in BLOCKS}


@pytest.mark.parametrize("kind", MODELS)
def test_off_settings_change_nothing_whatever_the_weights_are_kept_in(demo, comfy, cached, monkeypatch, kind):
    model = MODELS[kind](demo, comfy, monkeypatch)
    plain = demo.sample(model, [PROMPT], steps=4)
    for off in OFF:
        assert torch.equal(demo.sample(cached(model, off), [PROMPT], steps=4), plain)


def test_weights_that_leave_the_device_in_mid_run_change_nothing(demo, comfy, cached, reports, monkeypatch):
    from cache_core.adapters.comfyui.demo import load_model

    model = cached(load_model(), FirstBlockCache(residual_diff_threshold=0.3))
    undisturbed = demo.sample(model, [PROMPT], steps=12)
    left = []

    def free_the_device(step, *_):
        if step == 5:  # as another model that is loaded for a preview makes ComfyUI do
            left.append(model.partially_unload(torch.device("cpu"), 1e32))

    latent = demo.sample(model, [PROMPT], steps=12, callback=free_the_device)
    assert left == [pytest.approx(left[0])] and left[0] > 0
    assert torch.equal(latent, undisturbed)
    assert reports.all[0].count("forecast") == reports.all[1].count("forecast") >= 4


@pytest.fixture
def fetched(comfy, monkeypatch):
    """The modules that ComfyUI fetches block by block where it streams weights, which it does on a GPU only."""
    prefetch = pytest.importorskip("comfy.model_prefetch")
    import comfy.ops

    modules = []

    def make(queue, device, options):
        prefetch.PREFETCH_QUEUES.append([None, *queue, None])
        return prefetch.PREFETCH_QUEUES[-1]

    def fetch(chosen, *args, **kwargs):
        modules.extend(chosen)
        return None, True

    monkeypatch.setattr(prefetch, "PREFETCH_QUEUES", [])
    monkeypatch.setattr(prefetch, "make_prefetch_queue", make)
    monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", fetch)
    return modules


STREAMING = {architecture.name: architecture for architecture in all_architectures()}


@pytest.mark.parametrize("name", ["LTX-2", "MiniMax-H3"])
@by_strategy
def test_blocks_that_are_left_out_are_not_fetched_ahead(cached, reports, fetched, name, strategy):
    model = STREAMING[name].build()
    network = model.model.diffusion_model
    blocks = network.transformer_blocks if name == "LTX-2" else network.blocks
    streamed = {next(m for m in block.modules() if isinstance(m, torch.nn.Linear)): block for block in blocks}
    for layer in streamed:
        layer._v = "on its way"  # the mark of a layer whose weights are streamed
    latent = STREAMING[name].sample(cached(model, strategy), STREAMING[name].empty_latent(), steps=12)

    import comfy.model_prefetch

    comfy.model_prefetch.cleanup_prefetch_queues()  # what ComfyUI does after each node
    (report,) = reports.all
    calls, computed = len(report.calls), report.count("computed")
    first, *others = [Counter(streamed[layer] for layer in fetched)[block] for block in blocks]
    assert calls - computed >= 6
    assert all(torch.isfinite(part).all() for part in latent.unbind())
    if strategy.levels == ("block",):
        assert {first, *others} == {calls} and any("fetches each block's weights" in note for note in report.notes)
    else:
        asks_late = strategy.levels == ("model",)  # while the first block is on its way, in the rehearsal too
        assert first == (calls + 1 if asks_late else computed) and set(others) == {computed}
