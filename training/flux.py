"""Trains the tiny Flux by flow matching.

python -m training.flux --seconds 60 --out flux.safetensors
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cache_core.demo.sampling import TRANSFORMER_CONFIG, encode_prompts, velocity

from .clock import LossLog, shuffled, until
from .data import Pool, load_pool, make_pool

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

BATCH = 64
MUON_RATE, ADAM_RATE = 3e-3, 1.5e-3
TEXT_DROPOUT = 0.12  # these pictures teach the empty prompt, which guidance needs
AVERAGE_DECAY = 0.995


def new_transformer() -> FluxTransformer2DModel:
    """An untrained transformer that predicts 0: modulations and the last layer begin at zero."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(**TRANSFORMER_CONFIG)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, _start_spread(name, inputs=weight.shape[1]))
            elif name.endswith("bias"):
                weight.zero_()
    return transformer


def train(transformer: FluxTransformer2DModel, pool: Pool, seconds: float, bfloat16: bool = False) -> dict[str, Tensor]:
    """Trains the float32 weights in place, on a copy that computes; returns the running average of the weights."""
    worker = copy.deepcopy(transformer)
    if bfloat16:
        worker.bfloat16()
    weights, worker_weights = list(transformer.parameters()), list(worker.parameters())
    average = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
    tokens, pooled = encode_prompts(pool.prompts)
    optimizers = _optimizers(transformer)
    batches = shuffled(len(pool.prompts), BATCH)
    with LossLog("flux") as log:
        for step, progress in enumerate(until(seconds)):
            chosen = next(batches)
            torch._foreach_copy_([weight.data for weight in worker_weights], [weight.data for weight in weights])
            loss = flow_loss(worker, pool.latents[chosen].float(), tokens[chosen], pooled[chosen])
            worker.zero_grad()
            loss.backward()
            for weight, worker_weight in zip(weights, worker_weights, strict=True):
                weight.grad = worker_weight.grad.float()
            nn.utils.clip_grad_norm_(weights, 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * _rate_factor(step, progress)
                optimizer.step()
            decay = min(AVERAGE_DECAY, (step + 1) / (step + 21))  # forget the random start quickly
            torch._foreach_lerp_(list(average.values()), [weight.data for weight in weights], 1 - decay)
            log.add(loss.item())
    return average


def flow_loss(transformer: FluxTransformer2DModel, latents: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity, at random sigmas, some of the texts left out."""
    count = len(latents)
    heard = torch.rand(count) > TEXT_DROPOUT
    sigmas = torch.sigmoid(1.1 * torch.randn(count) + 0.2)  # most often where the picture takes shape
    noise = torch.randn_like(latents)
    noisy = torch.lerp(latents, noise, sigmas[:, None, None, None])
    predicted = velocity(transformer, noisy, sigmas, tokens * heard[:, None, None], pooled * heard[:, None])
    return (predicted - (noise - latents)).square().mean()


def export(average: dict[str, Tensor], path: Path) -> None:
    """Writes float16 weights under diffusers' names, which ComfyUI's UNETLoader reads too."""
    save_file({name: weight.half() for name, weight in average.items()}, path, metadata={"format": "pt"})


def _start_spread(name: str, inputs: int) -> float:
    if "norm" in name or name == "proj_out.weight":
        return 0.0
    if "timestep_embedder" in name:
        return 0.02
    writes_to_residual = any(part in name for part in ("to_out", "to_add_out", "net.2", "proj_out"))
    return (0.7 if writes_to_residual else 1.0) / math.sqrt(inputs)


def _optimizers(transformer: FluxTransformer2DModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else (modulations, embeddings, biases, norms)."""
    matrices, others = [], []
    for name, weight in transformer.named_parameters():
        in_block = "transformer_blocks" in name and weight.ndim == 2 and "norm" not in name
        (matrices if in_block else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _rate_factor(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / 60) * min(1.0, max(0.01, (1 - progress) / 0.7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pool", type=Path, help="made by training.data; otherwise made now")
    parser.add_argument("--pictures", type=int, default=5000, help="how many, when the pool is made now")
    parser.add_argument("--start", type=Path, help="weights to go on from, such as the shipped ones")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bfloat16", action="store_true", help="faster, on processors with bfloat16 units only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    transformer = new_transformer()
    if arguments.start:
        transformer.load_state_dict(load_file(arguments.start))
    pool = load_pool(arguments.pool) if arguments.pool else make_pool(arguments.pictures)
    export(train(transformer, pool, arguments.seconds, arguments.bfloat16), arguments.out)


if __name__ == "__main__":
    main()
