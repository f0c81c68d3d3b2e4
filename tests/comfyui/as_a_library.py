"""A script that uses ComfyUI without its server: it loads the pack, calls nodes and prints what became of it as JSON.

python as_a_library.py COMFYUI PACK
"""

import asyncio
import json
import sys
from types import SimpleNamespace

comfyui, pack = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfyui)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402
import utils.extra_config  # noqa: E402, F401 - first, as in ComfyUI's main.py: `comfy/utils.py` would hide it

import nodes  # noqa: E402


def call(name, **inputs):
    """What a node gives."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    given = getattr(node(), node.FUNCTION)(**inputs)
    return getattr(given, "result", given)


def report_of_a_cached_run():
    """The report of eight steps of the demo, which has no browser and no prompt to belong to."""
    model, clip, _ = call("RefrainLoadDemo")
    cached, settings = call("RefrainTaylorSeerCache", model=model, cache_interval=3)
    (cached,) = call("RefrainApplySettings", model=model, settings=settings)
    positive, negative = (call("CLIPTextEncode", clip=clip, text=text)[0] for text in ("a big red ball", ""))
    (latent,) = call("EmptyLatentImage", width=64, height=64, batch_size=1)
    (samples,) = call(
        "KSampler", model=cached, seed=1, steps=12, cfg=3.0, sampler_name="euler", scheduler="simple",
        positive=positive, negative=negative, latent_image=latent, denoise=1.0,
    )  # fmt: skip
    return json.loads(call("RefrainCacheReport", samples=samples)[1])


def no_server():
    assert "server" not in sys.modules


def a_server_that_nobody_made():
    import server

    assert not hasattr(server.PromptServer, "instance")


def a_stand_in_for_the_server():
    sys.modules["server"].PromptServer.instance = SimpleNamespace(client_id=None, last_node_id=None)


found = {}
for kind in (no_server, a_server_that_nobody_made, a_stand_in_for_the_server):
    kind()
    loaded = asyncio.run(nodes.load_custom_node(pack))
    ours = sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Refrain"))
    with torch.inference_mode():
        found[kind.__name__] = {"loaded": loaded, "nodes": ours, "report": report_of_a_cached_run() if ours else None}
print(json.dumps(found))
