"""Nodes for a private ComfyUI under test, put into its custom_nodes folder: what is alive in it, and exact results."""

import ctypes
import gc
import hashlib
import os
import sys
from typing import ClassVar

import psutil
import torch


class Census:
    """How many objects and tensors are alive in this process, the tensors' bytes, and how much memory is resident."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "count", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"model": ("MODEL",), "other": ("MODEL",)}}  # these stay loaded meanwhile

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")  # never the same

    def count(self, **_):
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # else glibc keeps what is free below something in use
        objects = gc.get_objects()
        tensors = [each for each in objects if issubclass(type(each), torch.Tensor)]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        resident = psutil.Process().memory_info().rss
        counts = {"objects": len(objects), "tensors": len(tensors), "bytes": sum(storages.values())}
        return {"ui": {"census": [{**counts, "resident": resident}]}}


class Fingerprint:
    """The bytes of a latent as a short text: equal only if the latents are, bit for bit."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "take", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def take(self, samples):
        latent = samples["samples"].cpu().contiguous()
        digest = hashlib.sha256(latent.view(torch.uint8).numpy().tobytes()).hexdigest()
        return {"ui": {"fingerprint": [f"{digest} {tuple(latent.shape)} {latent.dtype}"]}}


class RandomText:
    """A prompt of random numbers for a model whose text encoder is not here."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "draw", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "width": ("INT", {"default": 4096, "max": 10000})}}

    def draw(self, seed, width):
        return ([[torch.randn(1, 7, width, generator=torch.Generator().manual_seed(seed)), {}]],)


class Deeds:
    """What of Python's audited deeds this process did: files, processes, network, code; and whose code did it."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "tell", "test", True
    AUDITED = ("open", "os.", "shutil.", "tempfile.", "subprocess.", "socket.", "urllib.", "exec", "pickle.", "ctypes.")
    OURS = os.path.join("custom_nodes", "refrain")  # in the names under which ComfyUI imports the pack
    done: ClassVar[dict] = {"the pack": [], "ComfyUI": []}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):
        return float("nan")

    def tell(self):
        return {"ui": {whose: deeds[-50:] for whose, deeds in self.done.items()}}

    @classmethod
    def listen(cls, event, arguments):
        """An audit hook. A deed is of the innermost code of the pack or ComfyUI, unless a file is being imported."""
        if not event.startswith(cls.AUDITED):
            return
        frame, whose = sys._getframe(1), None
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name.startswith("importlib."):
                return
            is_comfyui = name.split(".")[0] in ("comfy", "nodes", "execution", "server", "folder_paths", "main")
            whose = whose or ("the pack" if cls.OURS in name else "ComfyUI" if is_comfyui else None)
            frame = frame.f_back
        if whose:
            cls.done[whose].append(f"{event} {arguments!r}"[:200])


sys.addaudithook(Deeds.listen)


class Anything:
    """Whatever a careless node may hand on: linked values pass by ComfyUI's own checks."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "give", "test"
    KINDS: ClassVar[dict] = {
        "NaN": float("nan"),
        "infinity": float("inf"),
        "huge": 10**400,
        "text": "often",
        "long text": "often " * 100_000,
        "nothing": None,
        "list": list(range(100_000)),
        "tensor": torch.zeros(2, 3),
        "array": torch.zeros(2, 3).numpy(),
        "flag": True,
    }

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"what": (list(cls.KINDS),)}}

    def give(self, what):
        return (self.KINDS[what],)


# Not written out, or lists of all nodes take these for the pack's.
NODE_CLASS_MAPPINGS = dict(
    (f"Test{node.__name__}", node) for node in (Census, Fingerprint, RandomText, Anything, Deeds)
)
