"""Trains the tiny Wan, text to video, by flow matching.

python -m training.wan --out wan.safetensors

Killed and started again, it goes on where it last saved, with the losses it would have had.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cache_core.demo import motion, wan
from cache_core.demo.sampling import GuidedPrediction, denoise, encode_prompts, flow_sigmas

from .clock import every
from .flow import Learner, flow_loss, going_on, start
from .yardstick import share_right

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


class Stage(NamedTuple):
    """What is trained on until this progress. A frame has (size / 16) ** 2 tokens, a step about 1,500."""

    until: float
    size: int
    frames: int
    batch: int
    lean: float  # of the sigmas: larger and longer videos show through more noise
    every: int = 1  # of how many frames one is shown: many motions are learned sooner from few frames far apart


STAGES = (
    Stage(0.12, 64, 5, 16, 0.8),
    Stage(0.6, 64, 5, 16, 1.2, every=3),
    Stage(0.78, 64, wan.FRAMES, 6, 1.2),
    Stage(1.0, wan.SIZE, wan.FRAMES, 3, 1.3),
)
MUON_RATE, ADAM_RATE = 12e-3, 3e-3
MEASURED_EVERY = 600.0  # seconds
MEASURED = 24  # videos
SAMPLING_STEPS, SHIFT = 16, 3.0


def new_transformer(**changed: int) -> WanTransformer3DModel:
    """An untrained transformer."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel.from_config(wan.TRANSFORMER_CONFIG | changed)
    start(transformer)
    return transformer


def new_learner(bfloat16: bool = False, **changed: int) -> Learner:
    """What learns an untrained transformer; `changed` is of its configuration."""
    return Learner(new_transformer(**changed), muon_rate=MUON_RATE, adam_rate=ADAM_RATE, bfloat16=bfloat16)


def take_step(learner: Learner, steps: int, stages: tuple[Stage, ...] = STAGES, seed: int = 0) -> float:
    """The next of so many training steps, on new videos; returns its loss. The seed and the step's number say which."""
    stage = stage_of(learner.steps / steps, stages)
    chance = random.Random(f"{seed} {learner.steps}")
    generator = torch.Generator().manual_seed(chance.getrandbits(60))
    clips = [motion.random_clip(chance) for _ in range(stage.batch)]
    latents = wan.encode(motion.render(clips, stage.frames, stage.size, generator, stage.every))
    texts = encode_prompts(list(map(motion.prompt_of, clips)))
    loss = partial(flow_loss, velocity=wan.velocity, latents=latents, texts=texts, lean=stage.lean, generator=generator)
    with sdpa_kernel(SDPBackend.MATH):  # up to a fifth faster: flash attention goes back slowly on a CPU
        return learner.learn(loss, learner.steps / steps)


def stage_of(progress: float, stages: tuple[Stage, ...] = STAGES) -> Stage:
    """The stage at this progress from 0.0 to 1.0."""
    return next((stage for stage in stages if progress < stage.until), stages[-1])


def sample(transformer: WanTransformer3DModel, clips: list[motion.Clip], frames: int, size: int) -> Tensor:
    """Videos (clips, frames, 3, size, size) in 0..1. Clip number n has seed n."""
    predict = GuidedPrediction(transformer, list(map(motion.prompt_of, clips)), velocity=wan.velocity)
    noise = torch.cat([wan.noise(seed, frames, size) for seed in range(len(clips))])
    return wan.decode(denoise(predict, noise, flow_sigmas(SAMPLING_STEPS, SHIFT)))


def measure(learner: Learner, stage: Stage, picture: Path) -> dict[str, float]:
    """Of videos by the averaged weights, the share that is as the prompt says. Some are drawn into a picture."""
    transformer = new_transformer()
    transformer.load_state_dict(learner.average)
    chance = random.Random("measured")
    clips = [motion.random_clip(chance) for _ in range(MEASURED)]
    videos = sample(transformer.eval(), clips, stage.frames, stage.size)
    _draw(videos[:8], picture)
    return share_right(videos, clips, stage.every)


def export(average: dict[str, Tensor], path: Path) -> None:
    """Writes float16 weights under Wan's own names, which ComfyUI's UNETLoader reads, and `wan.transformer_of`."""
    config = json.dumps({"transformer": wan.COMFYUI_CONFIG})
    stored = {wan.wans_key(key): weight.half().contiguous() for key, weight in average.items()}
    save_file(stored, path, metadata={"format": "pt", "config": config})


def _draw(videos: Tensor, path: Path) -> None:
    from PIL import Image

    rows = rearrange(videos, "videos frames color h w -> (videos h) (frames w) color")
    Image.fromarray((rows * 255).byte().numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="beside it: .checkpoint, and .png of some videos")
    parser.add_argument("--bfloat16", action="store_true", help="faster, on processors with bfloat16 units only")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    learner = new_learner(arguments.bfloat16)
    checkpoint, picture = arguments.out.with_suffix(".checkpoint"), arguments.out.with_suffix(".png")
    step, to_measure = partial(take_step, seed=arguments.seed), every(MEASURED_EVERY)
    for is_last in going_on(learner, "wan", arguments.steps, step, checkpoint):
        if next(to_measure) or is_last:
            shares = measure(learner, stage_of(learner.steps / arguments.steps), picture)
            print("right:", ", ".join(f"{part} {share:.0%}" for part, share in shares.items()), flush=True)
    export(learner.average, arguments.out)


if __name__ == "__main__":
    main()
