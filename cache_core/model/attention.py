"""Attention: which modules are one, and of which kind, told by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

from ..strategy.strategy import AttentionKind

# The names that models give their attention modules, the last part of the dotted name. Not those of what stands around
# them: layer_norm_self_attn, adaln_modulation_cross_attn (Cosmos), compress_to_attn, expand_from_attn (PixelDiT).
_ATTENTION = re.compile(r"(?!\w*(norm|modulation|to_attn|from_attn))(\w+_)?(attn\d?|attention)")
_CROSS = re.compile(r"(\w+_)?(cross_attn|cross_attention|attn2|\w+_to_\w+_attn)")


def is_attention(name: str) -> bool:
    """Whether a module of this dotted name is attention.

    >>> is_attention("blocks.3.self_attn"), is_attention("blocks.3.self_attn.q")
    (True, False)
    """
    return _ATTENTION.fullmatch(name.rpartition(".")[2]) is not None


def kind_of(name: str, module: nn.Module | None = None) -> AttentionKind:
    """The kind of attention of a module, or of the block an attention operation runs in, by its dotted name.

    A module that says of itself whether it is cross-attention, as those of diffusers do, is believed.

    >>> kind_of("blocks.3.cross_attn"), kind_of("temporal_transformer_blocks.0.attn1"), kind_of("double_blocks.0")
    ('cross', 'temporal', 'spatial')
    """
    says = getattr(module, "is_cross_attention", None)
    if says or (says is None and _CROSS.fullmatch(name.rpartition(".")[2])):
        return "cross"
    return "temporal" if "temporal" in name else "spatial"


def kind_of_operation(block: str, query: Tensor, key: Tensor, given: Iterable[Tensor]) -> AttentionKind:
    """The kind of an attention operation, (rows, ..., tokens, channels), in this block, given these tensors.

    Cross-attention takes its keys from another stream, (rows, tokens, channels), which the block was given beside the
    one that the queries are of. That there are more or fewer keys than queries does not show it: a picture's own may
    be pooled, or those of reference pictures may be added.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    if queries == keys:
        return kind_of(block)
    streams = {tensor.shape[1] for tensor in given if tensor.ndim == 3}
    return "cross" if {queries, keys} <= streams else kind_of(block)
