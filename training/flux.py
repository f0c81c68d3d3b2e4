"""Trains the tiny Flux by flow matching.

python -m training.flux --seconds 60 --out flux.safetensors
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_core.demo.sampling import TRANSFORMER_CONFIG, encode_prompts, velocity

from .clock import LossLog, shuffled, until
from .data import Pool, load_pool, make_pool
from .flow import Learner, flow_loss, start

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

BATCH = 64
MUON_RATE, ADAM_RATE = 3e-3, 1.5e-3


def new_transformer() -> FluxTransformer2DModel:
    """An untrained transformer."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(**TRANSFORMER_CONFIG)
    start(transformer)
    return transformer


def train(transformer: FluxTransformer2DModel, pool: Pool, seconds: float, bfloat16: bool = False) -> dict[str, Tensor]:
    """Trains the float32 weights in place; returns the running average of the weights."""
    learner = Learner(transformer, muon_rate=MUON_RATE, adam_rate=ADAM_RATE, bfloat16=bfloat16)
    tokens, pooled = encode_prompts(pool.prompts)
    batches = shuffled(len(pool.prompts), BATCH)
    with LossLog("flux") as log:
        for progress, chosen in zip(until(seconds), batches):
            latents, texts = pool.latents[chosen].float(), (tokens[chosen], pooled[chosen])
            log.add(learner.learn(partial(flow_loss, velocity=velocity, latents=latents, texts=texts), progress))
    return learner.average


def export(average: dict[str, Tensor], path: Path) -> None:
    """Writes float16 weights under diffusers' names, which ComfyUI's UNETLoader reads too."""
    save_file({name: weight.half() for name, weight in average.items()}, path, metadata={"format": "pt"})


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
