"""The training pictures, as latents with prompts: python -m training.data --out pool.safetensors."""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cache_core.demo import codec, scene

_RENDERED_AT_ONCE = 50


@dataclass(frozen=True)
class Pool:
    """Pictures to train on, kept as latents."""

    latents: Tensor  # (pictures, 16, size / 8, size / 8), float16
    prompts: list[str]


def random_pictures(count: int, chance: random.Random, size: int = 64) -> tuple[Tensor, list[str]]:
    """New pictures (count, 3, size, size) in 0..1, and their prompts."""
    scenes = [scene.random_scene(chance) for _ in range(count)]
    return scene.render(scenes, size), [scene.prompt_of(told) for told in scenes]


def make_pool(count: int, seed: int = 0) -> Pool:
    """count pictures rounded up to a multiple of 50: about half a millisecond each."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    latents, prompts = [], []
    while len(prompts) < count:
        pictures, told = random_pictures(_RENDERED_AT_ONCE, chance)
        latents.append(codec.encode(pictures).half())
        prompts += told
    return Pool(torch.cat(latents), prompts)


def save_pool(pool: Pool, path: Path) -> None:
    """Writes a pool to one safetensors file."""
    save_file({"latents": pool.latents}, path, metadata={"prompts": json.dumps(pool.prompts)})


def load_pool(path: Path) -> Pool:
    """Reads what save_pool wrote."""
    with safe_open(path, framework="pt") as stored:
        return Pool(stored.get_tensor("latents"), json.loads(stored.metadata()["prompts"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pool = make_pool(arguments.pictures, arguments.seed)
    save_pool(pool, arguments.out)
    print(f"{len(pool.prompts)} pictures in {arguments.out}")


if __name__ == "__main__":
    main()
