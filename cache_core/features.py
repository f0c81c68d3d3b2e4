"""Features: the tensors a site of the model takes and gives, taken out of whatever structure carries them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Features = tuple[Tensor, ...]
Path = tuple[Any, ...]
Layout = tuple[tuple[int, ...], ...]
SMALLEST_NORM = 1e-12  # two outputs of zeros are alike
ENOUGH_TOKENS = 1024  # times channels: a mean of millions of values


@dataclass(frozen=True)
class Structure:
    """What a call returned besides some of its tensors: the nesting, and the other leaves."""

    spec: TreeSpec
    constants: tuple[Any, ...]  # a leaf, or _TENSOR where one of those tensors goes

    def filled_with(self, features: Sequence[Tensor]) -> Any:
        """The same structure around other tensors."""
        tensors = iter(features)
        leaves = [next(tensors) if constant is _TENSOR else constant for constant in self.constants]
        return tree_unflatten(leaves, self.spec)

    @property
    def tensor_count(self) -> int:
        """How many tensors it takes."""
        return sum(constant is _TENSOR for constant in self.constants)

    @property
    def has_other_tensors(self) -> bool:
        """Whether there are tensors that are not features, a mask say: what they hold belongs to one call."""
        return any(isinstance(constant, Tensor) for constant in self.constants)


_TENSOR = object()


def tensors_in(value: Any, path: Path = ()) -> dict[Path, Tensor]:
    """All tensors of nested tuples and lists, and of dicts of arguments, by the way to them.

    Not those inside a dict that is an argument itself, such as ComfyUI's transformer options: nothing flows there.
    """
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif isinstance(value, dict) and len(path) <= 1:
        items = value.items()
    else:
        return {}
    return {way: tensor for key, item in items for way, tensor in tensors_in(item, (*path, key)).items()}


def at_path(value: Any, path: Path) -> Any:
    """The item that `tensors_in` found there. Raises LookupError or TypeError where there is none."""
    for key in path:
        value = value[key]
    return value


def is_feature(leaf: Any) -> bool:
    """Whether a leaf is a tensor that can be subtracted and forecast."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf is a tensor of any type."""
    return isinstance(leaf, Tensor)


def taken_apart(value: Any, belongs: Callable[[Any], bool] = is_feature) -> tuple[Features, Structure]:
    """The floating-point tensors of a value (or those that belong), and the structure to put others in their place."""
    leaves, spec = tree_flatten(value)
    taken = tuple(leaf for leaf in leaves if belongs(leaf))
    return taken, Structure(spec, tuple(_TENSOR if belongs(leaf) else leaf for leaf in leaves))


def copied(features: Sequence[Tensor]) -> Features:
    """Tensors of our own: blocks write in place into those they are given."""
    return tuple(tensor.detach().clone() for tensor in features)


def same_layout(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether both have the same number of tensors, of the same shapes."""
    return [tensor.shape for tensor in some] == [tensor.shape for tensor in others]


def rows_layout(tensors: Sequence[Tensor], branches: int) -> Layout:
    """Shapes of one branch's share of these tensors; whole shapes where the first axis does not divide."""
    return tuple(
        (tensor.shape[0] // branches, *tensor.shape[1:]) if has_rows([tensor], branches) else (branches, *tensor.shape)
        for tensor in tensors
    )


def has_rows(tensors: Sequence[Tensor], branches: int) -> bool:
    """Whether the first axis of each may be rows of so many branches."""
    return all(tensor.ndim and tensor.shape[0] % branches == 0 for tensor in tensors)


def split_rows(features: Sequence[Tensor], branches: int) -> list[Features] | None:
    """One branch's share of each tensor, for each of the branches joined along the first axis.

    None where the first axis does not divide: the branches can't be told apart.
    """
    if branches == 1:
        return [tuple(features)]
    if not has_rows(features, branches):
        return None
    return list(zip(*(tensor.chunk(branches) for tensor in features), strict=True))


def join_rows(parts: Sequence[Sequence[Tensor]]) -> Features:
    """The opposite of `split_rows`."""
    if len(parts) == 1:
        return tuple(parts[0])
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def thinned(tensor: Tensor) -> Tensor:
    """About a thousand of the tokens, evenly spread, (rows, tokens, channels): enough to tell how far two are apart."""
    stride = tensor.shape[1] // ENOUGH_TOKENS if tensor.ndim == 3 else 1
    return tensor[:, ::stride].contiguous() if stride > 1 else tensor


def relative_change(now: Tensor, before: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    """sum|now - before| / sum|before| as a scalar tensor: 0 for no change, NaN or infinite where nothing can be said.

    A batch counts as its most changed row, (rows, tokens, channels), so that a picture's decisions do not depend on
    calmer pictures beside it. Where tokens are spread over ranks, `total` sums a small tensor over these.
    """
    axes = tuple(range(1, now.ndim)) if now.ndim > 2 else tuple(range(now.ndim))
    change = (now - before).abs().sum(axes, dtype=torch.float32)
    change, size = total(torch.stack((change, before.abs().sum(axes, dtype=torch.float32))))
    return (change / size).max()


def relative_error(some: Any, reference: Any) -> float:
    """|some - reference| / |reference|, the largest of all features of two outputs alike. Waits for the device.

    NaN, and outputs without features, count as infinite.
    """
    errors = [
        (a.detach().float() - b.detach().float()).norm() / b.detach().float().norm().clamp_min(SMALLEST_NORM)
        for a, b in zip(taken_apart(some)[0], taken_apart(reference)[0], strict=True)
    ]
    error = torch.stack(errors).max().item() if errors else float("inf")
    return error if error == error else float("inf")


def all_finite(value: Any) -> bool:
    """Whether no feature of a value holds NaN or infinity. Waits for the device."""
    return all(bool(torch.isfinite(feature).all()) for feature in taken_apart(value)[0])


def bytes_held(state: Any) -> int:
    """Bytes of all tensors reachable from a state through dataclasses and containers, each storage once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in _storages(state)}.values())


def _storages(value: Any) -> list[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        return [value.untyped_storage()]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)) or hasattr(value, "popleft"):
        return [storage for item in value for storage in _storages(item)]
    return []
