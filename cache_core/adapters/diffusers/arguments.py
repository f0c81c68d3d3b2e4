"""What a forward pass was called with, by the names that diffusers' models have for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...model.structure import tensors_in

TIMESTEPS = ("timestep", "timesteps", "t")
CONDITIONINGS = ("encoder_hidden_states", "cap_feats", "text_bth", "encoder_hidden_states_llama3", "input_ids")


@dataclass
class Arguments:
    """The arguments of one forward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any]  # all of them, in the order of the model's parameters

    @property
    def timestep(self) -> Any:
        """None if there is none."""
        return self._first_of(TIMESTEPS)

    @property
    def conditioning(self) -> Tensor | None:
        """What the prompt was made into."""
        return next(iter(tensors_in(self._first_of(CONDITIONINGS)).values()), None)

    @property
    def latent(self) -> Tensor:
        """The first tensor of all: diffusers' models take the latent first."""
        return next(iter(tensors_in((list(self.named.values()),)).values()))

    @property
    def wants_gradients(self) -> bool:
        """Whether the output is to be differentiated by one of them."""
        tensors = tensors_in((self.args, self.kwargs)).values()
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def _first_of(self, names: tuple[str, ...]) -> Any:
        return next((self.named[name] for name in names if self.named.get(name) is not None), None)
