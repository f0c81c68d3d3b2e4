"""First Block Cache as diffusers 0.42.1 does it.

The first block always runs. If what it adds to the image tokens changed little since the last computed pass, the other
blocks pass on what they are given, and what they added then is added to the first block's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.hooks import FirstBlockCacheConfig
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import CacheContext
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from .parts import States, run_with

Streams = tuple[Tensor, Tensor | None]  # image tokens, text tokens: (batch, tokens, channels) each


@dataclass
class Memory:
    """What one context keeps of its last computed pass, and what was decided for the pass that runs."""

    reuses: bool = False
    head_output: Tensor | Streams | None = None
    head_residual: Tensor | None = None  # (batch, image tokens, channels), in the model's dtype
    rest: Streams | None = None  # what the blocks after the first added


class FirstBlockCache:
    """Skips all blocks but the first. One decision for the whole batch, and a memory for each context."""

    def __init__(self, model: nn.Module, config: FirstBlockCacheConfig) -> None:
        blocks = [
            block
            for name, blocks in model.named_children()
            if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(blocks, nn.ModuleList)
            for block in blocks
        ]
        if len(blocks) < 2:
            raise IndexError(f"First Block Cache needs two blocks or more, {type(model).__name__} has {len(blocks)}.")
        self.model, self.threshold = model, config.threshold
        self.head, self.tail = blocks[0], blocks[-1]
        self.layouts = {block: TransformerBlockRegistry.get(unwrap_module(block).__class__) for block in blocks}
        self.memories = States(Memory)

    def call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: CacheContext | None
    ) -> Any:
        """One pass: the first block decides, the others follow."""
        arounds = {block: partial(self._around_block, context, block) for block in self.layouts}
        arounds[self.head] = partial(self._around_head, context)
        return run_with(arounds, self.model, forward, args, kwargs)

    def reset(self) -> None:
        """Forget all contexts."""
        self.memories.clear()

    def _around_head(self, context: CacheContext | None, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layout = self.layouts[self.head]
        entered = layout._get_parameter_from_args_kwargs("hidden_states", args, kwargs)
        output = forward(*args, **kwargs)
        residual = _image(output, layout) - entered
        memory = self.memories.of(context)
        memory.reuses = memory.head_residual is not None and not self._moved(residual, memory.head_residual)
        if memory.reuses:
            return _plus(output, memory.rest, layout)
        memory.head_output = _streams(output, layout) if isinstance(output, tuple) else output
        memory.head_residual = residual
        return output

    def _around_block(
        self, context: CacheContext | None, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        layout = self.layouts[block]
        passed_on = _given(layout, args, kwargs)
        memory = self.memories.of(context)
        if memory.reuses:
            return passed_on
        output = forward(*args, **kwargs)
        if block is self.tail:
            memory.rest = _minus(output, memory.head_output, layout)
        return output

    def _moved(self, now: Tensor, before: Tensor) -> bool:
        """mean|now - before| / mean|before| > threshold, in the residual's dtype. NaN is not: it reuses (W22)."""
        change = (now - before).abs().mean() / before.abs().mean()
        return change.item() > self.threshold  # waits for the GPU


def _streams(output: tuple[Any, ...], layout: TransformerBlockMetadata) -> Streams:
    return output[layout.return_hidden_states_index], output[layout.return_encoder_hidden_states_index]


def _image(output: Any, layout: TransformerBlockMetadata) -> Tensor:
    return output[layout.return_hidden_states_index] if isinstance(output, tuple) else output


def _minus(output: Any, head_output: Any, layout: TransformerBlockMetadata) -> Streams:
    """What the blocks after the first added. TypeError if the last one returns another kind than the first (W20)."""
    if not isinstance(output, tuple):
        return output - head_output, None
    image, text = _streams(output, layout)
    return image - head_output[0], text - head_output[1]


def _plus(output: Any, rest: Streams, layout: TransformerBlockMetadata) -> Any:
    """The first block's output with what the others added, in the first block's own layout."""
    if not isinstance(output, tuple):
        return rest[0] + output
    image, text = _streams(output, layout)
    joined: list[Tensor | None] = [None] * len(output)
    joined[layout.return_hidden_states_index] = rest[0] + image
    joined[layout.return_encoder_hidden_states_index] = rest[1] + text
    return tuple(joined)


def _given(layout: TransformerBlockMetadata, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A block's own inputs in the layout of its output."""
    image = layout._get_parameter_from_args_kwargs("hidden_states", args, kwargs)
    if layout.return_encoder_hidden_states_index is None:
        return image
    text = layout._get_parameter_from_args_kwargs("encoder_hidden_states", args, kwargs)
    if text is None:
        return image
    return (image, text) if layout.return_hidden_states_index == 0 else (text, image)
