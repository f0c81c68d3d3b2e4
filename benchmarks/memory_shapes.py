"""What a strategy will hold on a model: its own code, on tensors with the shapes of real features and no values."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cache_core import FIRST_BLOCK, Schedule, Strategy
from cache_core.run.memory import bytes_held
from cache_core.strategy import Level, Site, Step, copied, sampled_tokens
from cache_core.strategy.packed import packed

GIB = 2**30
Outputs = tuple[int, ...]  # the tokens of each tensor that a module gives
STEPS = 20


@dataclass(frozen=True)
class ModelShape:
    """The features of a model: tokens of each tensor, for one branch; all have the same channels, in 16 bit."""

    name: str
    branches: int  # of the prompt: 1 where guidance is distilled
    channels: int
    main: tuple[int, ...]  # the stream that the first block is tested by, but for its channels
    stack: Outputs  # the streams that leave the chains of blocks
    blocks: tuple[Outputs, ...]
    modules: tuple[Outputs, ...]  # attention and feed-forward, as TaylorSeer's level module chooses them
    attentions: tuple[Outputs, ...]
    crosses: tuple[Outputs, ...]  # cross-attentions
    latents: tuple[tuple[int, ...], ...]  # what the model gives: (1, channels, ...)
    has_rows: bool = True  # whether features have a batch axis

    @property
    def hidden_states(self) -> int:
        """S: bytes of what flows through a block, of all branches."""
        return self.branches * 2 * self.channels * max(map(sum, self.blocks))

    def outputs(self, level: Level) -> list[tuple[Site, tuple[Tensor, ...]]]:
        """The sites of this level and what each gives for one branch."""
        if level in ("output", "guidance"):
            return [(Site(level, ""), self._latents(level))]
        if level == "attention":
            kinds = [("spatial", each) for each in self.attentions] + [("cross", each) for each in self.crosses]
            return [(Site(level, str(n), kind=kind), self._features(each)) for n, (kind, each) in enumerate(kinds)]
        groups = {"model": (self.stack,), "block": self.blocks, "module": self.modules}[level]
        return [(Site(level, str(number)), self._features(each)) for number, each in enumerate(groups)]

    def first_residual(self) -> Tensor:
        """What the first block adds to the stream it is tested by."""
        return torch.empty(*[1] * self.has_rows, *self.main, self.channels, dtype=torch.bfloat16, device="meta")

    def _features(self, tokens: Outputs) -> tuple[Tensor, ...]:
        rows = [1] * self.has_rows
        return tuple(torch.empty(*rows, n, self.channels, dtype=torch.bfloat16, device="meta") for n in tokens)

    def _latents(self, level: Level) -> tuple[Tensor, ...]:
        shapes = self.latents * (1 if level == "output" else 2)  # with the prompt and without
        return tuple(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)


@dataclass
class Computed:
    """A call that reuses nothing, as a strategy sees it. See `strategy.Call`."""

    site: Site
    schedule: Schedule
    step: Step
    may_be_left_out: bool = False
    serves_until: int | None = None
    may_reuse: bool = False
    adds_noise: bool = False
    reason: str = ""
    order: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_of_no_use(self) -> bool:
        return self.serves_until is not None and self.serves_until < self.step.index

    def note(self, text: str) -> None:
        self.notes.append(text)


def bytes_to_hold(strategy: Strategy, model: ModelShape) -> int:
    """The most that a strategy holds on a model at any time, where every step of an even schedule is computed."""
    return max(bytes_by_step(strategy, model))


def bytes_held_late(strategy: Strategy, model: ModelShape) -> int:
    """The same from the middle of the run on, when FasterCache has begun to leave out the negative prompt."""
    return max(bytes_by_step(strategy, model)[STEPS // 2 :])


def bytes_by_step(strategy: Strategy, model: ModelShape) -> list[int]:
    """What is held after each step. Of two branches the second is the negative prompt's, which may be left out."""
    schedule = Schedule([1 - step / STEPS for step in range(STEPS + 1)])
    sites = [pair for level in strategy.levels for pair in model.outputs(level)]
    sites = [
        (site, given)
        for site, given in sites
        if site.level in ("output", "model", "block", "module")
        or (strategy.steps_in_at(site) and (site.level != "guidance" or model.branches > 1))
    ]
    held = []
    for may_be_left_out in (False, True)[: model.branches]:
        own = [(site, given) for site, given in sites if site.level != "guidance" or not may_be_left_out]
        states = {site: strategy.new_state(site) for site, _ in own}
        held.append([])
        for sigma in schedule.sigmas[:-1]:
            for site, given in own:
                call = Computed(site, schedule, schedule.step_at(sigma), may_be_left_out)
                _compute(strategy, call, states[site], given, model)
            held[-1].append(bytes_held([*states.values()]))
    return [sum(of_branches) for of_branches in zip(*held)]


def _compute(strategy: Strategy, call: Computed, state: object, given: tuple[Tensor, ...], model: ModelShape) -> None:
    around = strategy.around(call, state)
    request = next(around)
    try:
        while True:
            first = copied([sampled_tokens(model.first_residual())])
            dtype = None if call.site.level == "guidance" else strategy.stored_as(call.site)
            own = first if request is FIRST_BLOCK else tuple(packed(each, dtype, copy=True) for each in given)
            request = around.send(own)
    except StopIteration:
        return


def _wan(name: str, height: int, width: int) -> ModelShape:
    tokens, latent = 21 * (height // 16) * (width // 16), (1, 16, 21, height // 8, width // 8)  # 81 frames
    each = ((tokens,),) * 40
    return ModelShape(name, 2, 5120, (tokens,), (tokens,), each, 3 * each, each, each, (latent,))


def _minimax(name: str, frames: int) -> ModelShape:
    times = (frames - 5) // 17 * 5 + 2  # of 1344 x 768, patches of 32 x 32
    audio = round(frames / 24 * 40)
    tokens = 512 + 2 * audio + times * 24 * 42  # text, stereo sound and picture in one sequence
    each, latents = ((tokens,),) * 50, ((1, 24, times, 48, 84), (1, 32, 2, audio))
    return ModelShape(name, 1, 5376, (tokens,), (tokens,), each, 2 * each, each, (), latents, has_rows=False)


MODELS = [
    ModelShape(
        "Flux, 1024 x 1024", 1, 3072, main=(4096,), stack=(4096, 512, 4608),
        blocks=((4096, 512),) * 19 + ((4608,),) * 38,
        modules=((4096,), (512,)) * 19 + ((4608,),) * 38,  # a single block has none of its own, and counts whole
        attentions=((4608,),) * 57, crosses=(), latents=((1, 16, 128, 128),),
    ),
    ModelShape(
        "Qwen-Image, 1024 x 1024", 2, 3072, main=(4096,), stack=(4096, 256), blocks=((4096, 256),) * 60,
        modules=((4096, 256), (4096,), (256,)) * 60, attentions=((4096, 256),) * 60, crosses=(),
        latents=((1, 16, 128, 128),),
    ),
    _wan("Wan 14B, 81 frames of 832 x 480", 480, 832),
    _wan("Wan 14B, 81 frames of 1280 x 720", 720, 1280),
    _minimax("MiniMax-H3, 124 frames of 1344 x 768", 124),
]  # fmt: skip
