"""ComfyUI's own models in their real sizes, on tensors without values: what one call keeps is what shapes foretell."""

import importlib
from functools import partial

import pytest
import torch
from memory_shapes import MODELS, bytes_to_hold
from random_models import SHAPES

from cache_core.run.run import CacheRun
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.step import Schedule

SCHEDULE = Schedule([1 - step / 20 for step in range(21)])
WITHOUT_VALUES = dict(device="meta", dtype=torch.bfloat16)
STRATEGIES = {
    "attention": PyramidAttentionBroadcast(),
    "block": TaylorSeerCache(cache_level="block", max_order=0),
    "module": TaylorSeerCache(cache_level="module", max_order=0),
}
FORMS = {
    "8 bit, away": PyramidAttentionBroadcast(cache_dtype="8 bit", cache_device="cpu"),
    "block, away": TaylorSeerCache(cache_level="block", max_order=0, cache_device="cpu"),
}
AS_COMPUTED = {form: STRATEGIES["block" if "block" in form else "attention"] for form in FORMS}
QWEN = dict(in_channels=64, out_channels=16)
CASES = {  # of each: the class, its settings, and the shapes of what it is given: latent, text, others
    "Flux": ("comfy.ldm.flux.model.Flux", SHAPES["flux"].unet, (16, 128, 128), (512, 4096), [(768,), ()]),
    "Qwen": ("comfy.ldm.qwen_image.model.QwenImageTransformer2DModel", QWEN, (16, 1, 128, 128), (256, 3584), []),
    "Wan": ("comfy.ldm.wan.model.WanModel", SHAPES["wan"].unet, (16, 21, 60, 104), (512, 4096), []),
    "MiniMax": ("comfy.ldm.minimax.model.MiniMaxH3Model", {}, (24, 37, 48, 84), (512, 5120), []),
}
SOUND = (32, 2, 207)  # of MiniMax-H3, beside the picture


def empty(rows, shape):
    return torch.empty(rows, *shape, **WITHOUT_VALUES)


@pytest.fixture(scope="module", params=CASES)
def case(request, comfy):
    """The shape that is foretold from, and a call of the model with these options."""
    path, settings, latent, text, others = CASES[request.param]
    package, name = path.rsplit(".", 1)
    module = pytest.importorskip(package, reason="this ComfyUI does not have it")
    operations = importlib.import_module("comfy.ops").disable_weight_init
    model = getattr(module, name)(**settings, operations=operations, **WITHOUT_VALUES)
    shape = next(shape for shape in MODELS if shape.name.startswith(request.param))
    given = [empty(shape.branches, latent), empty(shape.branches, ()), empty(shape.branches, text)]
    if request.param == "MiniMax":  # which also reads its timestep
        given[:2] = [given[0], empty(1, SOUND)], torch.tensor([500.0])
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "MiniMax":  # writes in place, and has no form for tensors without values
            patch.setattr("comfy.quant_ops.ck.rms_rope_split_half_", lambda *args, **kwargs: None)
        yield shape, model, partial(model, *given, *(empty(shape.branches, other) for other in others))


def report_of_one_call(strategy, shape, model, call):
    from comfy.ldm.modules.attention import attention_pytorch

    run, branches = CacheRun([strategy], SCHEDULE), [str(number) for number in range(shape.branches)]
    attend = lambda _, *args, **kwargs: run.call_attention(attention_pytorch, *args, **kwargs)  # noqa: E731
    forward = partial(call, transformer_options={"optimized_attention_override": attend})
    run.begin_evaluation()
    run.call_model(model, forward, torch.full((shape.branches,), 0.5), branches, branches)
    return run.report


@pytest.mark.parametrize("level", STRATEGIES)
def test_what_a_call_keeps_is_what_shapes_foretell(case, level):
    report = report_of_one_call(STRATEGIES[level], *case)
    assert report.bytes_held == report.bytes_foretold == bytes_to_hold(STRATEGIES[level], case[0]) > 0


@pytest.mark.parametrize("form", FORMS)
def test_so_is_what_it_keeps_in_other_forms_and_in_main_memory(case, form, monkeypatch):
    monkeypatch.setattr("cache_core.strategy.lane.HOST", torch.device("meta"))
    monkeypatch.setattr("cache_core.strategy.packed.AT_ONCE", 2**40)  # tensors without values take no memory
    report, as_computed = report_of_one_call(FORMS[form], *case), AS_COMPUTED[form]
    here, away = (report.bytes_held, report.bytes_foretold), (report.bytes_away, report.bytes_foretold_away)
    assert away == (bytes_to_hold(FORMS[form], case[0]),) * 2 and here == (0, 0)
    share = 0.5 if "8 bit" in form else 1
    assert away[0] == pytest.approx(share * bytes_to_hold(as_computed, case[0]), rel=0.01)
