"""How many floating-point operations modules take: counted as they run, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn

from ..strategy.strategy import AttentionKind
from .attention import is_attention, kind_of
from .compiled import method_of
from .hooks import Forward, Hook
from .structure import flattened, is_feature, tensors_in


class Counter:
    """Counts what layers and attention take while its hooks are on.

    Left out are norms, gates and activations, which take little, and layers that are no modules.
    """

    def __init__(self) -> None:
        self.operations = 0  # so far
        self.work: dict[str, int] = {}  # by name, what modules took of it
        self._attentions = 0  # how many of them are in it

    def watching(self, blocks: Mapping[str, nn.Module], methods: Mapping[str, str]) -> list[Hook]:
        """Hooks that count in these blocks, by dotted name. Put them before all others."""
        hooks = {}
        for name, block in blocks.items():
            for path, module in block.named_modules(prefix=name):
                if inputs := _inputs_of(module):
                    hooks[module] = Hook(module, partial(self._layer, inputs), method_of(module, methods))
                elif is_attention(path):
                    around = partial(self._attention, kind_of(path, module))
                    hooks[module] = Hook(module, around, method_of(module, methods))
        return list(hooks.values())

    def noting(self, modules: Mapping[str, nn.Module], methods: Mapping[str, str]) -> list[Hook]:
        """Hooks that note, by name, what each of these modules takes. Put them behind those that count."""
        self.work.clear()
        return [Hook(each, partial(self._noted, name), method_of(each, methods)) for name, each in modules.items()]

    def operation(self, forward: Forward, query: Tensor, key: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """Around one attention operation, forward(query, key, value, ...)."""
        self._attended([query], key.shape[-2])
        return forward(query, key, *args, **kwargs)

    def _noted(self, name: str, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        before = self.operations
        output = forward(*args, **kwargs)
        self.work[name] = self.work.get(name, 0) + self.operations - before
        return output

    def _layer(self, inputs: int, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if isinstance(output, Tensor):
            self.operations += 2 * inputs * output.numel()
        return output

    def _attention(self, kind: AttentionKind, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        """Around a module: if no operation was seen in it, what it takes and gives tells. Cross takes keys second."""
        before = self._attentions
        output = forward(*args, **kwargs)
        if self._attentions == before:
            returned, _ = flattened(output)
            given = [tensor for tensor in tensors_in((args, kwargs)).values() if is_feature(tensor) and tensor.ndim > 2]
            others = given[1:2] if kind == "cross" else ()
            self._attended(returned, sum(map(tokens_in, others or returned)))
        return output

    def _attended(self, queries: Iterable[Tensor], keys: int) -> None:
        self._attentions += 1
        self.operations += attention_work(queries, keys)


def attention_work(queries: Iterable[Tensor], keys: int) -> int:
    """Twice two operations for each query, (..., tokens, channels), key and channel: one product weighs, one sums."""
    return 4 * keys * sum(tensor.numel() for tensor in queries)


def tokens_in(tensor: Tensor) -> int:
    """How many tokens attend to each other: volumes, (rows, frames, height, width, channels), lay them along three."""
    return prod(tensor.shape[1:-1]) if tensor.ndim == 5 else tensor.shape[-2] if tensor.ndim > 1 else 1


def _inputs_of(module: nn.Module) -> int:
    """How many products each number that a linear layer or a convolution gives is the sum of; 0 for other modules.

    Not by its weights: quantised ones are packed.
    """
    if any(True for _ in module.children()):
        return 0
    if isinstance(inputs := getattr(module, "in_features", None), int):
        return inputs
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels // module.groups * prod(module.kernel_size)
    return 0
