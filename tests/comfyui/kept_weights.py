"""The demo model with its weights kept in every form that ComfyUI casts, dequantises or patches when a layer runs."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import Parameter
from torch.nn.functional import linear
from zoo.architecture import is_older

BLOCKS = [f"double_blocks.{index}" for index in range(2)] + [f"single_blocks.{index}" for index in range(4)]


def block_of(name):
    """The block that a module is in; the empty text outside of all."""
    return next((block for block in BLOCKS if name.startswith(f"{block}.")), "")


def resident_nowhere(demo, monkeypatch):
    """ComfyUI keeps no layer's weights on the device, as with --novram: each is cast when it runs."""
    from comfy.model_patcher import ModelPatcher

    from cache_core.adapters.comfyui.demo import load_model

    own = ModelPatcher.partially_load

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        return own(self, device_to, 0.1, force_patch_weights)

    monkeypatch.setattr(ModelPatcher, "partially_load", partially_load)
    return load_model()


def resident_nowhere_with_a_lora(demo, monkeypatch):
    model = resident_nowhere(demo, monkeypatch)
    generator = torch.Generator().manual_seed(3)
    weights = {name: value for name, value in model.model.state_dict().items() if name.endswith(".qkv.weight")}
    changes = {name: (0.002 * torch.randn(value.shape, generator=generator),) for name, value in weights.items()}
    clone = model.clone()
    assert clone.add_patches(changes, 1.0)
    return clone


def in_fp8(demo, monkeypatch):
    """Weights in 8 bits, cast to what is computed in whenever a layer runs."""
    return _loaded(_weights_of(demo), dtype=torch.float8_e4m3fn)


def quantised_to_fp8(demo, monkeypatch):
    return _quantised(demo, "float8_e4m3fn", largest=448.0, stored=lambda weight: weight.to(torch.float8_e4m3fn))


def quantised_to_int8(demo, monkeypatch):
    return _quantised(demo, "int8_tensorwise", largest=127.0, stored=lambda weight: weight.round().to(torch.int8))


def in_layers_of_ones_own(demo, monkeypatch):
    """As packs for GGUF do it: a Linear of their own that keeps its weight packed, and unpacks it when it runs."""
    import comfy.ops

    class Packed(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def _load_from_state_dict(self, weights, prefix, *args):
                weight = weights[f"{prefix}weight"]
                self.scale = weight.abs().max() / 127
                self.weight = Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
                self.bias = Parameter(weights[f"{prefix}bias"]) if f"{prefix}bias" in weights else None

            def forward_comfy_cast_weights(self, input):
                weight, bias = comfy.ops.cast_bias_weight(self, input)
                return linear(input, weight * self.scale, bias)

    model = _loaded(_weights_of(demo), custom_operations=Packed)
    assert model.model.diffusion_model.single_blocks[0].linear1.weight.dtype is torch.int8
    return model


MODELS = {
    "resident nowhere": resident_nowhere,
    "resident nowhere, with a LoRA": resident_nowhere_with_a_lora,
    "fp8": in_fp8,
    "quantised to fp8": quantised_to_fp8,
    "quantised to int8": quantised_to_int8,
    "packed in layers of one's own": in_layers_of_ones_own,
}


def _weights_of(demo):
    return {name: value.clone() for name, value in demo.model().model.diffusion_model.state_dict().items()}


def _loaded(weights, **options):
    import comfy.sd

    if is_older():
        pytest.skip("this ComfyUI takes every Flux to have 24 heads, and can't load the demo's in this form")
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)
    assert model is not None
    return model


def _quantised(demo, kind, largest, stored):
    """ComfyUI's quantised layers, some in each block."""
    weights = _weights_of(demo)
    mark = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    for name in [name for name in weights if name.endswith(".weight") and block_of(name) and weights[name].ndim == 2]:
        layer = name.removesuffix(".weight")
        scale = weights[name].abs().max() / largest
        weights[name] = stored(weights[name] / scale)
        weights[f"{layer}.weight_scale"], weights[f"{layer}.comfy_quant"] = scale, mark.clone()
    model = _loaded(weights)
    assert type(model.model.diffusion_model.single_blocks[0].linear1.weight.data).__name__ == "QuantizedTensor"
    return model
