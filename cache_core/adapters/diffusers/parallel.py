"""The processes among which diffusers splits a forward pass."""

from __future__ import annotations

from typing import Any

from torch import nn


def context_parallel_group(model: nn.Module) -> Any:
    """The ranks among which diffusers splits the tokens, if `model.enable_parallelism` was called for that."""
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    return None if config is None else config._flattened_mesh.get_group()
