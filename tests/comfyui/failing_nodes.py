"""Nodes for a private ComfyUI under test: a model whose block fails, and a sampler that waits to be cancelled."""

import time

import comfy.model_management
import torch
from comfy_execution.utils import get_executing_context
from server import PromptServer


class FailInBlockThree:
    """Block three fails when it runs for the so-manieth time; this node itself if that is 0."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "how": (["exception", "out of memory"],), "run": ("INT",)}}

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")  # counts anew in each prompt

    def patch(self, model, how, run):
        if run == 0:
            raise ValueError("before any block")
        clone, runs = model.clone(), []
        block = model.model.diffusion_model.single_blocks[0]

        def forward(*args, **kwargs):
            runs.append(1)
            if len(runs) == run and how == "exception":
                raise ValueError("block three")
            if len(runs) >= run and how == "out of memory":  # once is no failure: it is tried again
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return type(block).forward(block, *args, **kwargs)

        clone.add_object_patch("diffusion_model.single_blocks.0.forward", forward)
        return (clone,)


class WaitForInterrupt:
    """After so many steps the sampler tells the client, then waits until it is interrupted."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "steps": ("INT",)}}

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")  # counts anew in each prompt

    def patch(self, model, steps):
        clone, seen = model.clone(), []

        def wait(given):
            seen.append(1)
            if len(seen) == steps + 1:
                # ComfyUI's own event of this step is left out if the one before was sent less than 100 ms ago.
                told = {"prompt_id": get_executing_context().prompt_id, "steps": steps}
                PromptServer.instance.send_sync("waiting", told, PromptServer.instance.client_id)
                deadline = time.monotonic() + 60
                while not comfy.model_management.processing_interrupted():
                    if time.monotonic() > deadline:
                        raise TimeoutError("nobody interrupted")
                    time.sleep(0.01)
            return given["conds_out"]

        clone.set_model_sampler_pre_cfg_function(wait)
        return (clone,)


# Not written out, or lists of all nodes take these for the pack's.
NODE_CLASS_MAPPINGS = dict((node.__name__, node) for node in (FailInBlockThree, WaitForInterrupt))
