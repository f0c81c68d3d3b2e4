"""Flow matching: the loss and the learner that the tiny transformers are trained with."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache_core.demo.sampling import Velocity

from .clock import LossLog, every

TEXT_DROPOUT = 0.12  # these teach the empty prompt, which guidance needs
AVERAGE_DECAY = 0.995
WARM_UP = 60  # steps
SAVED_EVERY = 180.0  # seconds


def start(transformer: nn.Module) -> None:
    """Sets the weights of an untrained transformer so that it predicts 0: modulations and the last layer are zero."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, _start_spread(name, inputs=weight.shape[1]))
            elif name.endswith("bias"):
                weight.zero_()


class Learner:
    """The float32 weights of a transformer, which learn in place, the copy that computes, and their running average."""

    def __init__(self, transformer: nn.Module, *, muon_rate: float, adam_rate: float, bfloat16: bool = False) -> None:
        self.worker = copy.deepcopy(transformer)
        if bfloat16:
            for weight in self.worker.parameters():
                weight.data = weight.data.bfloat16()
        self.weights, self.worker_weights = list(transformer.parameters()), list(self.worker.parameters())
        self.average = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
        self.optimizers = _optimizers(transformer, muon_rate, adam_rate)
        self.steps = 0

    def learn(self, loss_of: Callable[[nn.Module], Tensor], progress: float) -> float:
        """One training step, at this progress from 0.0 to 1.0; returns its loss."""
        torch._foreach_copy_([weight.data for weight in self.worker_weights], [weight.data for weight in self.weights])
        loss = loss_of(self.worker)
        self.worker.zero_grad()
        loss.backward()
        for weight, worker_weight in zip(self.weights, self.worker_weights, strict=True):
            weight.grad = worker_weight.grad.float()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * _rate_factor(self.steps, progress)
            optimizer.step()
        decay = min(AVERAGE_DECAY, (self.steps + 1) / (self.steps + 21))  # forget the random start quickly
        torch._foreach_lerp_(list(self.average.values()), [weight.data for weight in self.weights], 1 - decay)
        self.steps += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, for torch.save."""
        return {
            "steps": self.steps,
            "weights": [weight.data for weight in self.weights],
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Continues where the learner of this state was."""
        self.steps = state["steps"]
        torch._foreach_copy_([weight.data for weight in self.weights], state["weights"])
        torch._foreach_copy_(list(self.average.values()), list(state["average"].values()))
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)


def going_on(
    learner: Learner, name: str, steps: int, take_step: Callable[[Learner, int], float], checkpoint: Path
) -> Iterator[bool]:
    """Trains to so many steps, from where the checkpoint is, if there is one; it is written every few minutes.

    Yields after each step whether it was the last.
    """
    if checkpoint.exists():
        learner.go_on_from(torch.load(checkpoint))
    to_save = every(SAVED_EVERY)
    with LossLog(name, seconds=60, steps=learner.steps) as log:
        while learner.steps < steps:
            log.add(take_step(learner, steps))
            is_last = learner.steps == steps
            if next(to_save) or is_last:
                save(learner.state(), checkpoint)
            yield is_last


def save(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint, in one move: a run that is killed meanwhile leaves the one before."""
    written = path.with_suffix(".part")
    torch.save(state, written)
    os.replace(written, path)


def flow_loss(
    transformer: nn.Module,
    velocity: Velocity,
    latents: Tensor,
    texts: tuple[Tensor, Tensor],
    lean: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity, at random sigmas, some of the texts left out.

    Sigmas are most often where the picture takes shape: a higher lean is for larger pictures, which show through more.
    """
    count = len(latents)
    heard = torch.rand(count, generator=generator) > TEXT_DROPOUT
    sigmas = torch.sigmoid(1.1 * torch.randn(count, generator=generator) + lean)
    noise = torch.randn(latents.shape, generator=generator)
    tokens, pooled = texts[0] * heard[:, None, None], texts[1] * heard[:, None]
    noisy = torch.lerp(latents, noise, sigmas.reshape(-1, *[1] * (latents.ndim - 1)))
    predicted = velocity(transformer, noisy, sigmas, tokens, pooled)
    return (predicted - (noise - latents)).square().mean()


def _start_spread(name: str, inputs: int) -> float:
    if "norm" in name or "time_proj" in name or name == "proj_out.weight":
        return 0.0
    if "time_embedder" in name or "timestep_embedder" in name:
        return 0.02
    writes_to_residual = any(part in name for part in ("to_out", "to_add_out", "net.2", "proj_out"))
    return (0.7 if writes_to_residual else 1.0) / math.sqrt(inputs)


def _optimizers(transformer: nn.Module, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else (modulations, embeddings, biases, norms)."""
    matrices, others = [], []
    for name, weight in transformer.named_parameters():
        in_block = "blocks." in name and weight.ndim == 2 and "norm" not in name
        (matrices if in_block else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=muon_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _rate_factor(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / WARM_UP) * min(1.0, max(0.01, (1 - progress) / 0.7))
