"""What else may flow beside the blocks of a model: a ControlNet's signal, a LoRA, the patches of other packs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cache_core.model.structure import flattened

from .architecture import Architecture, Draw

Addition = Callable[[Any], Any]  # of a patcher: a clone that has it
SIZE = 0.3  # of what is added, beside features near 1


def controlled(**signals: tuple[int, ...]) -> Addition:
    """A ControlNet's signal: for each of its lists, "input" or "output", how many tensors of which shape."""

    def add(patcher: Any) -> Any:
        from comfy.patcher_extension import WrappersMP

        draw = Draw(4)
        tensors = {part: [SIZE * draw(*shape) for _ in range(count)] for part, (count, *shape) in signals.items()}

        def apply(
            executor: Any, x: Any, t: Any, c_concat: Any, c_crossattn: Any, _: Any, *args: Any, **kwargs: Any
        ) -> Any:
            signal = {part: list(members) for part, members in tensors.items()}  # HunyuanDiT empties the lists
            return executor(x, t, c_concat, c_crossattn, signal, *args, **kwargs)

        clone = patcher.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "zoo control", apply)
        return clone

    return add


def patched(name: str) -> Addition:
    """Another pack's patch of this name ("double_block", "post_input"): it adds to the picture's tokens."""

    def add(patcher: Any) -> Any:
        clone = patcher.clone()
        clone.set_model_patch(lambda given: {**given, "img": given["img"] + SIZE * given["img"].roll(1, dims=1)}, name)
        return clone

    return add


def all_of(architecture: Architecture) -> dict[str, Addition]:
    """All that may flow beside its blocks."""
    return architecture.additions | _of_blocks(architecture)


def _of_blocks(architecture: Architecture) -> dict[str, Addition]:
    """What every model takes whose blocks are known: a LoRA, and another pack's patch on a block's own forward."""
    if not architecture.chains:
        return {}
    return {"LoRA": _lora(architecture.chains), "object patch": _patched_forward(architecture.chains[-1])}


def _lora(chains: tuple[str, ...]) -> Addition:
    """A LoRA of rank 2 on all matrices of these lists of blocks, by ComfyUI's own loader."""

    def add(patcher: Any) -> Any:
        import comfy.sd

        draw, weights = Draw(6), {}
        for name, weight in patcher.model.diffusion_model.state_dict().items():
            if (
                name.startswith(tuple(f"{chain}." for chain in chains))
                and name.endswith(".weight")
                and weight.ndim == 2
            ):
                key, (rows, columns) = name.removesuffix(".weight"), weight.shape
                weights[f"diffusion_model.{key}.lora_up.weight"] = SIZE * draw(rows, 2) * rows**-0.5
                weights[f"diffusion_model.{key}.lora_down.weight"] = draw(2, columns)
        clone, _ = comfy.sd.load_lora_for_models(patcher, None, weights, 1.0, 0.0)
        return clone

    return add


def _patched_forward(chain: str) -> Addition:
    """`add_object_patch` on the way the model runs the last block of a list: it adds to what comes out."""

    def add(patcher: Any) -> Any:
        from cache_core.adapters.comfyui.exceptions import METHODS

        blocks = patcher.model.diffusion_model.get_submodule(chain)
        name, block = list(blocks.named_children())[-1]
        method = METHODS.get(type(block).__name__, "forward")
        own = getattr(block, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            features, structure = flattened(own(*args, **kwargs))
            return structure.filled_with([feature + SIZE * feature.roll(1, dims=-2) for feature in features])

        clone = patcher.clone()
        clone.add_object_patch(f"diffusion_model.{chain}.{name}.{method}", run)
        return clone

    return add
