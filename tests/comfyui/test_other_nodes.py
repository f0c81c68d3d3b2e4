"""The caches beside other nodes on one model: theirs keep their effect, ours reuse, off settings change nothing."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from published import as_published
from zoo import all_architectures

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPT = "a big red ball at the center on a blue striped background"
STEPS = 12
OFF = [
    FirstBlockCache(residual_diff_threshold=0.0),
    TaylorSeerCache(cache_interval=1),
    PyramidAttentionBroadcast(spatial_attention_block_skip_range=1),
    FasterCache(spatial_attention_block_skip_range=1, unconditional_batch_skip_range=1),
    FirstBlockCache(residual_diff_threshold=1e-9),  # on, but never met: everything is measured and kept
]
ON = {
    "First Block Cache": FirstBlockCache(residual_diff_threshold=0.3, repair="off"),
    "TaylorSeer, output": TaylorSeerCache(cache_interval=2),
    "TaylorSeer, model": TaylorSeerCache(cache_interval=2, cache_level="model"),
    "TaylorSeer, block": TaylorSeerCache(cache_interval=2, cache_level="block"),
    "TaylorSeer, module": TaylorSeerCache(cache_interval=2, cache_level="module"),
    "Pyramid Attention Broadcast": PyramidAttentionBroadcast(),
    "FasterCache": as_published(unconditional_batch_skip_range=3),
}


def extra(module):
    """A file of ComfyUI's own nodes; skips where this ComfyUI has none of that name."""
    try:
        return importlib.import_module(f"comfy_extras.{module}")
    except ModuleNotFoundError:
        pytest.skip(f"this ComfyUI has no comfy_extras/{module}.py")


@pytest.fixture(autouse=True)
def no_forward_left(comfy, demo):
    """ComfyUI puts a patched forward's original back on the module itself, where tests that count by class miss it."""
    yield
    modules = list(demo.model().model.diffusion_model.modules())
    if any("forward" in vars(module) for module in modules):
        comfy.model_management.unload_all_models()
        for module in modules:
            vars(module).pop("forward", None)


def skip_layer_guidance(model):
    """A third prediction without some blocks, in the first half."""
    return extra("nodes_slg").SkipLayerGuidanceDiT.execute(model, 1.0, 0.0, 0.5, "1", "1, 2").result[0]


def skip_layer_guidance_simple(model):
    """The negative prompt is predicted without some blocks."""
    return extra("nodes_slg").SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, "", "1, 2").result[0]


def normalized_attention_guidance(model):
    return extra("nodes_nag").NAGuidance.execute(model, 5.0, 0.5, 2.5).result[0]


def perturbed_attention_guidance(model):
    """As packs for diffusion transformers do it: a third prediction whose attention returns the values unchanged."""
    import comfy.samplers

    def unmixed(function, query, key, value, heads, *args, **kwargs):
        mixed = function(query, key, value, heads, *args, **kwargs)
        return value.transpose(1, 2).reshape(mixed.shape) if value.ndim == 4 else value

    def guide(args):
        options = dict(args["model_options"])
        options["transformer_options"] = options["transformer_options"] | {"optimized_attention_override": unmixed}
        (perturbed,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], options
        )
        return args["denoised"] + 0.5 * (args["cond_denoised"] - perturbed)

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(guide)
    return clone


def lora(model, size=0.01):
    """Changes of the attention weights of all blocks, the same every time."""
    generator, clone = torch.Generator().manual_seed(3), model.clone()
    weights = {name: value for name, value in model.model.state_dict().items() if name.endswith(".qkv.weight")}
    changes = {name: (size * torch.randn(value.shape, generator=generator),) for name, value in weights.items()}
    assert clone.add_patches(changes, 1.0)
    return clone


def merged(model):
    """Two checkpoints of one architecture, mixed: the other is this one with weights changed."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return ModelMergeSimple().merge(model, lora(_plain(model), size=0.03), 0.5)[0]


def _plain(model):
    """This model without any wrappers."""
    clone = model.clone()
    for kinds in clone.wrappers.values():
        kinds.clear()
    return clone


def patched_block_forward(model):
    """As packs patch a block: `add_object_patch` on its forward."""
    path = "diffusion_model.single_blocks.1"
    own = type(model.get_model_object(path)).forward

    def forward(x, *args, **kwargs):
        output = own(model.model.diffusion_model.single_blocks[1], x, *args, **kwargs)
        return output + 0.1 * output.roll(1, dims=1)

    clone = model.clone()
    clone.add_object_patch(f"{path}.forward", forward)
    return clone


def patched_module(model):
    """As packs replace a module inside a block."""

    class Doubled(torch.nn.Module):
        def __init__(self, own):
            super().__init__()
            self.own = own

        def forward(self, x):
            return 1.5 * self.own(x)

    path, clone = "diffusion_model.double_blocks.1.img_mlp", model.clone()
    clone.add_object_patch(path, Doubled(model.get_model_object(path)))
    return clone


def rescaled(model):
    """A function in place of the guidance's sum."""
    clone = model.clone()
    clone.set_model_sampler_cfg_function(
        lambda args: args["uncond"] + 0.5 * args["cond_scale"] * (args["cond"] - args["uncond"])
    )
    return clone


def wrapped_function(model):
    """As packs wrap the call of the model."""
    clone = model.clone()
    clone.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"] * 1.05, args["timestep"], **args["c"])
    )
    return clone


NODES = {
    "SkipLayerGuidanceDiT": skip_layer_guidance,
    "SkipLayerGuidanceDiTSimple": skip_layer_guidance_simple,
    "NAGuidance": normalized_attention_guidance,
    "perturbed attention": perturbed_attention_guidance,
    "LoRA": lora,
    "ModelMergeSimple": merged,
    "patched block": patched_block_forward,
    "patched module": patched_module,
    "cfg function": rescaled,
    "model function wrapper": wrapped_function,
}
by_node = pytest.mark.parametrize("node", NODES)
by_name = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * name.endswith(("block", "module"))) for name in ON]
)
by_order = pytest.mark.parametrize("order", ["cache last", "cache first"])


@pytest.fixture(scope="module")
def uncached(demo):
    """The latent of the plain model with this node, or with none; sampled once."""
    known = {}

    def latent(node=None, steps=STEPS):
        if (node, steps) not in known:
            model = demo.model()
            known[node, steps] = demo.sample(NODES[node](model) if node else model, [PROMPT], steps=steps)
        return known[node, steps]

    return latent


def both(model, cache, node, order):
    """The model with a cache and another node, in this order."""
    return cache(node(model)) if order == "cache last" else node(cache(model))


def distance(some, other):
    return ((some - other).norm() / other.norm()).item()


@by_order
@by_node
def test_off_settings_change_nothing_beside_another_node(demo, cached, uncached, node, order):
    for strategy in OFF:
        model = both(demo.model(), lambda model, s=strategy: cached(model, s), NODES[node], order)
        assert torch.equal(demo.sample(model, [PROMPT], steps=4), uncached(node, steps=4)), strategy.title


@by_order
@by_node
@by_name
def test_a_cache_reuses_beside_another_node_which_keeps_its_effect(
    demo, cached, reports, uncached, name, node, order
):  # fmt: skip
    model = both(demo.model(), lambda model: cached(model, ON[name]), NODES[node], order)
    latent = demo.sample(model, [PROMPT], steps=STEPS)
    (report,) = reports.all
    assert report.count("reused", "forecast") >= 2
    assert distance(latent, uncached(node)) < distance(latent, uncached())


def test_a_branch_from_which_another_node_takes_blocks_is_reused_too(demo, cached, reports):
    model = cached(skip_layer_guidance_simple(demo.model()), TaylorSeerCache(cache_interval=2, cache_level="model"))
    demo.sample(model, [PROMPT], steps=STEPS)
    (report,) = reports.all
    assert report.count("forecast", branch="negative") >= 4
    assert report.count("forecast", branch="positive") >= 4


def test_normalized_attention_guidance_keeps_the_negative_prompt_and_the_report_says_so(demo, cached, reports):
    model = cached(normalized_attention_guidance(demo.model()), FasterCache(unconditional_batch_skip_range=3))
    demo.sample(model, [PROMPT], steps=STEPS)
    (report,) = reports.all
    assert all(set(call.branches) == {"positive", "negative"} for call in report.calls)
    assert any("mixes it into the positive one's attention" in note for note in report.notes)


UNET_NODES = {
    "FreeU": lambda model: extra("nodes_freelunch").FreeU.execute(model, 1.3, 1.4, 0.9, 0.2).result[0],
    "FreeU_V2": lambda model: extra("nodes_freelunch").FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).result[0],
    "PatchModelAddDownscale": lambda model: (
        extra("nodes_model_downscale")
        .PatchModelAddDownscale.execute(model, 2, 2.0, 0.0, 0.35, True, "bicubic", "bicubic")
        .result[0]
    ),
    "PerturbedAttentionGuidance": lambda model: (
        extra("nodes_pag").PerturbedAttentionGuidance.execute(model, 3.0).result[0]
    ),
    "LoRA": lambda model: _unet_lora(model),
}


def _unet_lora(model):
    generator, clone = torch.Generator().manual_seed(3), model.clone()
    weights = {name: value for name, value in model.model.state_dict().items() if name.endswith("attn1.to_q.weight")}
    changes = {name: (0.3 * torch.randn(value.shape, generator=generator),) for name, value in weights.items()}
    assert clone.add_patches(changes, 1.0)
    return clone


@pytest.fixture(scope="module")
def unet(comfy):
    """A tiny SD 1.5 with random weights, and the function that samples it."""
    (architecture,) = [found for found in all_architectures() if found.name == "SD 1.5"]
    return architecture.build(), lambda model: architecture.sample(model, architecture.empty_latent(), steps=STEPS)


@by_order
@pytest.mark.parametrize("node", UNET_NODES)
def test_nodes_for_unets_keep_their_effect_on_a_cached_unet(unet, cached, reports, node, order):
    model, sample = unet
    with_node, without = sample(UNET_NODES[node](model)), sample(model)

    def cache(model):
        return cached(model, TaylorSeerCache(cache_interval=2))

    for off in OFF[1::3]:
        both_off = both(model, lambda model, s=off: cached(model, s), UNET_NODES[node], order)
        assert torch.equal(sample(both_off), with_node), off.title
    reports.all.clear()
    latent = sample(both(model, cache, UNET_NODES[node], order))
    assert reports.all[0].count("forecast") >= 3
    assert distance(latent, with_node) < distance(latent, without)


EASY = {"EasyCache": "EasyCacheNode", "LazyCache": "LazyCacheNode"}
WHOLE = [name for name, strategy in ON.items() if set(strategy.levels) & {"output", "model", "block", "module"}]


def easy_cache(model, name="EasyCache"):
    """On a clone of what it is given: in float32 it writes into its input, which spoils the sampler's latent."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    clone.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "a clone", lambda executor, x, *args, **kwargs: executor(x.clone(), *args, **kwargs)
    )
    return getattr(extra("nodes_easycache"), EASY[name]).execute(clone, 0.05, 0.15, 0.95, False).result[0]


@pytest.mark.parametrize("other", EASY)
@pytest.mark.parametrize("name", WHOLE)
def test_a_node_after_comfyuis_own_cache_is_refused_with_the_way_out(demo, cached, name, other):
    with pytest.raises(ValueError, match=f"{ON[name].title}: EasyCache or LazyCache .* Remove one of the two"):
        cached(easy_cache(demo.model(), other), ON[name])


@pytest.mark.parametrize("other", EASY)
@pytest.mark.parametrize("name", WHOLE)
def test_a_node_before_comfyuis_own_cache_is_refused_before_the_first_step(demo, cached, name, other):
    model, steps = easy_cache(cached(demo.model(), ON[name]), other), []
    with pytest.raises(ValueError, match="Remove one of the two nodes"):
        demo.sample(model, [PROMPT], steps=STEPS, callback=lambda *_: steps.append(1))
    assert not steps


LEFT_ON_A_MODEL = {  # transformer options, by their nodes
    "rel_l1_thresh": "TeaCache",
    "magcache_thresh": "MagCache",
    "cache_dit_turbo": "CacheDiT",
    "tea_cache_attr": "TeaCache (ComfyUI_Patches_ll)",
    "fb_cache_attr": "First Block Cache (ComfyUI_Patches_ll)",
}


@pytest.mark.parametrize("option", LEFT_ON_A_MODEL)
def test_other_packs_caches_are_refused_by_their_name(demo, cached, option):
    model = demo.model().clone()
    model.model_options["transformer_options"][option] = 0.4
    with pytest.raises(ValueError, match=re.escape(f"First Block Cache: {LEFT_ON_A_MODEL[option]} is on this model")):
        cached(model, FirstBlockCache())


@by_order
@pytest.mark.parametrize("other", EASY)
def test_off_settings_change_nothing_beside_comfyuis_own_cache(demo, cached, other, order):
    alone = demo.sample(easy_cache(demo.model(), other), [PROMPT], steps=STEPS)
    for off in OFF[:4]:
        model = both(demo.model(), lambda model, s=off: cached(model, s), lambda m: easy_cache(m, other), order)
        assert torch.equal(demo.sample(model, [PROMPT], steps=STEPS), alone), off.title


@by_order
@pytest.mark.parametrize("other", EASY)
def test_attention_is_reused_in_the_calls_that_comfyuis_own_cache_computes(demo, cached, reports, other, order):
    from comfy.patcher_extension import WrappersMP

    computed = []

    def count(executor, *args, **kwargs):
        computed.append(1)
        return executor(*args, **kwargs)

    broadcast = PyramidAttentionBroadcast(spatial_attention_timestep_skip_end=1000)
    model = both(demo.model(), lambda m: cached(m, broadcast), lambda m: easy_cache(m, other), order)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)
    latent = demo.sample(model, [PROMPT], steps=20)
    (report,) = reports.all
    assert report.count("reused") >= 1
    assert len(computed) < 20
    assert distance(latent, demo.sample(demo.model(), [PROMPT], steps=20)) < 0.1
    assert any("EasyCache or LazyCache is on this model too" in note for note in report.notes)


def test_cache_nodes_of_other_levels_compose_whatever_their_order(demo, cached, reports):
    first, second = FirstBlockCache(residual_diff_threshold=0.3), PyramidAttentionBroadcast()
    latents = [
        demo.sample(cached(cached(demo.model(), a), b), [PROMPT], steps=STEPS)
        for a, b in ((first, second), (second, first))
    ]
    assert reports.all[0].count("forecast") == reports.all[1].count("forecast") >= 3
    assert distance(latents[0], latents[1]) < 1e-5


BOTH_STAND_IN = [
    ("First Block Cache", "TaylorSeer, output"),
    ("TaylorSeer, output", "First Block Cache"),
    ("TaylorSeer, block", "First Block Cache"),
    ("TaylorSeer, module", "TaylorSeer, output"),
]


@pytest.mark.parametrize(("earlier", "later"), BOTH_STAND_IN)
def test_of_two_caches_that_stand_in_for_model_calls_the_later_counts_and_the_report_says_so(
    demo, cached, reports, earlier, later
):
    alone = demo.sample(cached(demo.model(), ON[later]), [PROMPT], steps=STEPS)
    latent = demo.sample(cached(cached(demo.model(), ON[earlier]), ON[later]), [PROMPT], steps=STEPS)
    without, report = reports.all
    assert torch.equal(latent, alone)
    assert report.count("forecast") == without.count("forecast") >= 3
    assert f"the {ON[earlier].title} node before {ON[later].title} has no effect" in " ".join(report.notes)
    assert not without.notes


def test_a_cache_that_is_off_leaves_one_before_it_on_another_level(demo, cached, reports):
    off = TaylorSeerCache(cache_interval=1)
    latent = demo.sample(cached(cached(demo.model(), ON["First Block Cache"]), off), [PROMPT], steps=STEPS)
    assert torch.equal(latent, demo.sample(cached(demo.model(), ON["First Block Cache"]), [PROMPT], steps=STEPS))
    assert reports.all[0].count("forecast") == reports.all[1].count("forecast") >= 3
    assert not reports.all[0].notes


def test_a_cached_and_a_plain_clone_of_one_checkpoint_do_not_meet(demo, cached, uncached, reports):
    alone = demo.sample(cached(demo.model(), ON["First Block Cache"]), [PROMPT], steps=STEPS)
    with_cache, plain = cached(demo.model(), ON["First Block Cache"]), lora(demo.model())
    for _ in range(2):
        assert torch.equal(demo.sample(with_cache, [PROMPT], steps=STEPS), alone)
        assert torch.equal(demo.sample(plain, [PROMPT], steps=STEPS), uncached("LoRA"))
        assert torch.equal(demo.sample(demo.model(), [PROMPT], steps=STEPS), uncached())
    assert len(reports.all) == 3 and all(report.count("forecast") >= 3 for report in reports.all)


BLOCKS = [f"diffusion_model.{name}" for name in ("double_blocks.0", "double_blocks.1", "single_blocks.0")]
COMPILED = {  # what is compiled, and how ComfyUI does it: as TorchCompileModel, or as other packs, block by block
    "whole": ["diffusion_model"],
    "some blocks": BLOCKS,
}


def compiled(model, keys, backend):
    torch_helpers = pytest.importorskip("comfy_api.torch_helpers")
    clone = model.clone()
    options = {"guard_filter_fn": extra("nodes_torch_compile").skip_torch_compile_dict}
    torch_helpers.set_torch_compile_wrapper(model=clone, backend=backend, options=options, keys=list(keys))
    return clone


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "what", "order"),
    [
        ("First Block Cache", "whole", "cache last"),
        ("First Block Cache", "whole", "cache first"),
        ("First Block Cache", "some blocks", "cache last"),
        ("First Block Cache", "some blocks", "cache first"),
        ("TaylorSeer, output", "whole", "cache last"),
        ("Pyramid Attention Broadcast", "some blocks", "cache last"),
    ],
)
def test_a_compiled_model_is_cached_like_the_model_itself(demo, cached, reports, name, what, order):
    torch.compiler.reset()
    strategy = ON[name]
    reference = demo.sample(cached(demo.model(), strategy), [PROMPT], steps=9)
    model = both(
        demo.model(), lambda m: cached(m, strategy), lambda m: compiled(m, COMPILED[what], backend="eager"), order
    )
    latent = demo.sample(model, [PROMPT], steps=9)
    uncompiled, report = reports.all
    assert report.blocks == uncompiled.blocks
    assert report.count("reused", "forecast") == uncompiled.count("reused", "forecast") >= 2
    assert distance(latent, reference) < 1e-5
    assert not [
        name for name, module in demo.model().model.diffusion_model.named_modules() if "forward" in vars(module)
    ]


@pytest.mark.long
def test_a_model_compiled_by_inductor_is_cached_like_the_model_itself(demo, cached, reports):
    torch.compiler.reset()
    strategy, plain = ON["First Block Cache"], demo.sample(demo.model(), [PROMPT], steps=9)
    model = cached(compiled(demo.model(), BLOCKS[2:], "inductor"), strategy)
    latent = demo.sample(model, [PROMPT], steps=9)
    assert reports.all[-1].count("reused", "forecast") >= 2
    reference = demo.sample(cached(demo.model(), strategy), [PROMPT], steps=9)
    assert distance(latent, reference) < 1e-2 < distance(reference, plain)
