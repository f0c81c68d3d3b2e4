"""Trains the tiny Flux by flow matching, on pictures of 128 x 128 pixels and some of 64 x 64.

python -m training.flux --out flux.safetensors

Killed and started again, it goes on where it last saved, with the losses it would have had.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_core.demo import codec
from cache_core.demo.sampling import TRANSFORMER_CONFIG, encode_prompts, velocity
from cache_core.demo.still_life import SIZE

from .data import random_pictures, random_still_lifes
from .flow import Learner, flow_loss, going_on, start

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

BATCH = {64: 64, SIZE: 32}  # pictures of this size in one step
LEAN = {64: 0.2, SIZE: 0.8}  # of the sigmas: larger pictures show through more noise
SMALL = 0.15  # of the steps are on pictures of 64 pixels
OF_SCENES = 0.2  # of the large pictures show what the small ones do
MUON_RATE, ADAM_RATE = 4e-3, 1.5e-3


def new_transformer(**changed: int) -> FluxTransformer2DModel:
    """An untrained transformer; `changed` is of its configuration."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(**TRANSFORMER_CONFIG | changed)
    start(transformer)
    return transformer


def take_step(learner: Learner, steps: int, seed: int = 0) -> float:
    """The next of so many training steps, on new pictures; returns its loss. Seed and number say which they are."""
    chance = random.Random(f"{seed} {learner.steps}")
    generator = torch.Generator().manual_seed(chance.getrandbits(60))
    size = 64 if chance.random() < SMALL else SIZE
    of_one = BATCH[size] if size == 64 else int(BATCH[size] * OF_SCENES)
    pictures, prompts = random_pictures(of_one, chance, size, generator)
    if rest := BATCH[size] - of_one:
        more, told = random_still_lifes(rest, chance, generator)
        pictures, prompts = torch.cat([pictures, more]), prompts + told
    given = {"latents": codec.encode(pictures), "texts": encode_prompts(prompts), "lean": LEAN[size]}
    loss = partial(flow_loss, velocity=velocity, generator=generator, **given)
    return learner.learn(loss, learner.steps / steps)


def export(average: dict[str, Tensor], path: Path) -> None:
    """Writes float16 weights under diffusers' names, which ComfyUI's UNETLoader reads too."""
    save_file({name: weight.half() for name, weight in average.items()}, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights to go on from, such as the shipped ones")
    parser.add_argument("--out", type=Path, required=True, help="beside it: .checkpoint")
    parser.add_argument("--bfloat16", action="store_true", help="faster, on processors with bfloat16 units only")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    transformer = new_transformer()
    if arguments.start:
        transformer.load_state_dict(load_file(arguments.start))
    learner = Learner(transformer, muon_rate=MUON_RATE, adam_rate=ADAM_RATE, bfloat16=arguments.bfloat16)
    step, checkpoint = partial(take_step, seed=arguments.seed), arguments.out.with_suffix(".checkpoint")
    for is_last in going_on(learner, "flux", arguments.steps, step, checkpoint):
        if is_last:
            export(learner.average, arguments.out)


if __name__ == "__main__":
    main()
