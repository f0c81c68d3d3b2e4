"""Which files of ComfyUI hold a model of diffusion: the zoo must have one of each."""

from __future__ import annotations

import inspect
import re

from .architecture import is_older

NO_DENOISERS = {  # files whose models ComfyUI loads by the same classes, but that draw nothing by steps
    "rt_detr/rtdetr_v4.py": "finds objects",
    "depth_anything_3/model.py": "estimates depth",
    "sam3/detector.py": "segments",
}


def model_files() -> set[str]:
    """The files under comfy/ldm whose classes `comfy.model_base` makes models of."""
    import comfy.model_base

    source = inspect.getsource(comfy.model_base)
    modules = set(re.findall(r"unet_model=comfy\.ldm\.([\w.]+)\.\w+", source))
    return {module.replace(".", "/") + ".py" for module in modules}


def fewest_files() -> int:
    """How many this ComfyUI has at least: fewer means that they are no longer found."""
    return 20 if is_older() else 30
