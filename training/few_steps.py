"""Distils the tiny Flux to 8 and to 4 steps without guidance: progressive distillation, arXiv 2202.00512.

python -m training.few_steps --out few_steps.safetensors

A student learns to reach in one Euler step what its teacher reaches in two. The first teacher is the shipped model with
guidance at 32 steps; each student then teaches the next, of half as many steps. What they learn is a LoRA on the
shipped model, as Lightning and Turbo LoRAs are: few_steps_8.safetensors and few_steps_4.safetensors. Killed and started
again, the training goes on where it last saved.
"""

from __future__ import annotations

import argparse
import copy
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cache_core.demo import codec
from cache_core.demo.sampling import Velocity, encode_prompts, load_transformer, shifted, velocity

from .clock import LossLog, every
from .data import random_pictures
from .flow import save

if TYPE_CHECKING:
    from collections.abc import Iterator

STUDENTS = (16, 8, 4)  # their steps
EXPORTED = (8, 4)
SHIFT, GUIDANCE = 3.0, 3.0
RANK, RATE, WARM_UP, BATCH = 32, 2e-3, 50, 64
SAVED_EVERY = 180.0  # seconds


class LowRank(nn.Module):
    """A LoRA on the weight (out, in) of a linear layer; at first it changes nothing."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def with_lora(transformer: nn.Module) -> nn.Module:
    """The transformer with a LoRA on each linear layer of its blocks; nothing else of it learns."""
    transformer.requires_grad_(False)
    linear = [(name, part) for name, part in transformer.named_modules() if isinstance(part, nn.Linear)]
    for name, layer in linear:
        if "blocks." in name:
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
    return transformer


def loras(transformer: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Each LoRA, by its layer's name."""
    for name, part in transformer.named_modules():
        if isinstance(part, LowRank):
            yield name.removesuffix(".parametrizations.weight.0"), part


def distillation_loss(
    student: nn.Module, teacher: nn.Module, steps: int, guidance: float, latents: Tensor, texts: tuple[Tensor, Tensor],
    generator: torch.Generator, velocity: Velocity = velocity,
) -> Tensor:  # fmt: skip
    """How far one step of the student, of so many, is from two of the teacher: mean squared error of the velocity."""
    index = torch.randint(steps, (len(latents),), generator=generator)
    start, middle, end = (shifted(1 - (index + part) / steps, SHIFT) for part in (0.0, 0.5, 1.0))
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, _of_pictures(start))
    with torch.no_grad():
        guided = partial(_guided, teacher, guidance=guidance, texts=texts, velocity=velocity)
        half = noisy + _of_pictures(middle - start) * guided(noisy, start)
        reached = half + _of_pictures(end - middle) * guided(half, middle)
    wanted = (reached - noisy) / _of_pictures(end - start)
    return (velocity(student, noisy, start, *texts) - wanted).square().mean()


class Distillation:
    """A student and its teacher, and how far they are: so many training steps for each of STUDENTS."""

    def __init__(self, transformer: nn.Module, steps_each: int, bfloat16: bool = False) -> None:
        self.velocity = _in_bfloat16 if bfloat16 else velocity
        self.student = with_lora(transformer)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
        self.steps, self.steps_each = 0, steps_each

    @property
    def is_over(self) -> bool:
        return self.steps == self.steps_each * len(STUDENTS)

    @property
    def students_steps(self) -> int:
        """Of the student that the next training step is for."""
        return STUDENTS[min(self.steps // self.steps_each, len(STUDENTS) - 1)]

    def take_step(self) -> float:
        """The next training step, on new pictures; returns its loss. Its number says which they are."""
        chance = random.Random(f"few steps {self.steps}")
        torch.manual_seed(chance.getrandbits(60))  # of what is rendered
        generator = torch.Generator().manual_seed(chance.getrandbits(60))
        pictures, prompts = random_pictures(BATCH, chance)
        first = self.steps < self.steps_each
        given = (codec.encode(pictures), encode_prompts(prompts), generator, self.velocity)
        loss = distillation_loss(self.student, self.teacher, self.students_steps, GUIDANCE if first else 1.0, *given)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        within = self.steps % self.steps_each
        self.optimizer.param_groups[0]["lr"] = RATE * min(1.0, (within + 1) / WARM_UP, 1.1 - within / self.steps_each)
        self.optimizer.step()
        self.steps += 1
        return loss.item()

    def ended_student(self) -> int:
        """The steps of the student that the last training step finished, which teaches from now on; 0 if none."""
        if self.steps % self.steps_each:
            return 0
        self.teacher.load_state_dict(self.student.state_dict())
        return STUDENTS[self.steps // self.steps_each - 1]

    def state(self) -> dict:
        """All that the next step depends on, for torch.save."""
        models = {name: dict(_learned(model)) for name, model in (("student", self.student), ("teacher", self.teacher))}
        return {"steps": self.steps, "optimizer": self.optimizer.state_dict(), **models}

    def go_on_from(self, state: dict) -> None:
        """Continues where the distillation of this state was."""
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        for model, stored in ((self.student, state["student"]), (self.teacher, state["teacher"])):
            model.load_state_dict(stored, strict=False)


def export(student: nn.Module, path: Path) -> None:
    """Writes a float16 LoRA under diffusers' names, which ComfyUI's LoraLoader reads too."""
    weights = {}
    for name, lora in loras(student):
        weights |= {f"transformer.{name}.lora_A.weight": lora.down, f"transformer.{name}.lora_B.weight": lora.up}
    save_file({name: weight.detach().half().contiguous() for name, weight in weights.items()}, path)


def _guided(
    transformer: nn.Module, noisy: Tensor, sigmas: Tensor, guidance: float, texts: tuple[Tensor, Tensor],
    velocity: Velocity,
) -> Tensor:  # fmt: skip
    with_prompt = velocity(transformer, noisy, sigmas, *texts)
    if guidance == 1.0:
        return with_prompt
    empty = encode_prompts([""] * len(noisy))
    return torch.lerp(velocity(transformer, noisy, sigmas, *empty), with_prompt, guidance)


def _in_bfloat16(*given: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return velocity(*given)


def _of_pictures(numbers: Tensor) -> Tensor:
    return numbers[:, None, None, None]


def _learned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, weight) for name, weight in model.state_dict().items() if name.endswith((".down", ".up")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="of training, for each student")
    parser.add_argument(
        "--out", type=Path, required=True, help="the steps are added to its name; beside it .checkpoint"
    )
    parser.add_argument("--bfloat16", action="store_true", help="faster, on processors with bfloat16 units only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    distillation = Distillation(load_transformer(), arguments.steps, arguments.bfloat16)
    checkpoint, to_save = arguments.out.with_suffix(".checkpoint"), every(SAVED_EVERY)
    if checkpoint.exists():
        distillation.go_on_from(torch.load(checkpoint))
    with LossLog("few steps", seconds=60, steps=distillation.steps) as log:
        while not distillation.is_over:
            log.add(distillation.take_step())
            ended = distillation.ended_student()
            if ended in EXPORTED:
                export(distillation.student, arguments.out.with_stem(f"{arguments.out.stem}_{ended}"))
            if ended or next(to_save):
                save(distillation.state(), checkpoint)


if __name__ == "__main__":
    main()
