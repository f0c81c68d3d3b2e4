"""diffusers' own cache tests, over every model of its with `CacheMixin` whose test inputs are small.

Upstream runs them on Flux alone. Models and inputs are those of the checkout's model tests.
"""

import importlib

from tests.models.testing_utils.cache import (
    FasterCacheTesterMixin,
    FirstBlockCacheTesterMixin,
    PyramidAttentionBroadcastTesterMixin,
    TaylorSeerCacheTesterMixin,
)

MODELS = {  # the checkout's test file -> the class in it that gives a model and its inputs
    "flux": "FluxTransformerTesterConfig",
    "hunyuan_video": "HunyuanVideoTransformerTesterConfig",
    "qwenimage": "QwenImageTransformerTesterConfig",
    "cogvideox": "CogVideoXTransformerTesterConfig",
    "wan": "WanTransformer3DTesterConfig",
    "wan_vace": "WanVACETransformer3DTesterConfig",
    "mochi": "MochiTransformerTesterConfig",
    "cogview4": "CogView4TransformerTesterConfig",
    "ltx": "LTXTransformerTesterConfig",
    "latte": "LatteTransformerTesterConfig",
    "flux2": "Flux2TransformerTesterConfig",
    "hunyuan_1_5": "HunyuanVideo15TransformerTesterConfig",
    "chroma": "ChromaTransformerTesterConfig",
    "bria": "BriaTransformerTesterConfig",
    "wan_animate": "WanAnimateTransformer3DTesterConfig",
}
STRATEGIES = {
    "PyramidAttentionBroadcast": PyramidAttentionBroadcastTesterMixin,
    "FirstBlockCache": FirstBlockCacheTesterMixin,
    "FasterCache": FasterCacheTesterMixin,
    "TaylorSeerCache": TaylorSeerCacheTesterMixin,
}
# The inputs are not [uncond, cond] batches; upstream sets this for Flux.
SETTINGS = {"FASTER_CACHE_CONFIG": FasterCacheTesterMixin.FASTER_CACHE_CONFIG | {"is_guidance_distilled": True}}

for file, config in MODELS.items():
    model = getattr(importlib.import_module(f"tests.models.transformers.test_models_transformer_{file}"), config)
    for strategy, tester in STRATEGIES.items():
        name = f"Test_{file}_{strategy}"
        globals()[name] = type(name, (model, tester), SETTINGS if strategy == "FasterCache" else {})
del model, tester
