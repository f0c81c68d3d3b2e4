"""The toy that all unit tests share: a diffusion transformer as ComfyUI writes them, a sampling loop, two strategies.

Letters: rows of a batch, tokens, C = 4 latent channels, W = 16 features.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cache_core import COMPUTE, CacheRun, Report, Schedule, Strategy
from cache_core.strategy.forecast import History

C, W, IMAGE, TEXT = 4, 16, 10, 6
PICTURE = (6, 10)  # height, width of latents that are pictures
NEGATIVE, POSITIVE = "negative", "positive"


class Operation:
    """One place's scaled_dot_product_attention."""

    def __init__(self) -> None:
        self.runs = self.rows = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.runs, self.rows = self.runs + 1, self.rows + len(query)
        return nn.functional.scaled_dot_product_attention(query, key, value)


class Attending(nn.Module):
    """Sends its attention operations through `attend`, which an adapter may replace."""

    @staticmethod
    def attend(operation: Operation, *args: Tensor) -> Tensor:
        return operation(*args)


def through_run(model: nn.Module, run: CacheRun) -> None:
    """As an adapter does: all of the model's attention operations go through the run."""
    for module in model.modules():
        if isinstance(module, Attending):
            module.attend = run.call_attention


class Attention(Attending):
    def __init__(self) -> None:
        super().__init__()
        self.runs = self.rows = 0
        self.qkv, self.out, self.operation = nn.Linear(W, 3 * W), nn.Linear(W, W), Operation()

    def forward(self, tokens: Tensor, text: Tensor | None = None) -> Tensor:
        self.runs, self.rows = self.runs + 1, self.rows + len(tokens)
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        if text is not None:
            _, key, value = self.qkv(text).chunk(3, dim=-1)
        return self.out(self.attend(self.operation, query, key, value))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.runs = self.rows = 0
        self.wide, self.narrow = nn.Linear(W, 2 * W), nn.Linear(2 * W, W)

    def forward(self, tokens: Tensor) -> Tensor:
        self.runs, self.rows = self.runs + 1, self.rows + len(tokens)
        return self.narrow(nn.functional.gelu(self.wide(tokens)))


class DoubleBlock(nn.Module):
    """Text and image in two streams that attend to each other; writes in place, as ComfyUI's Flux does."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.runs = self.rows = 0
        self.in_place = in_place
        self.attn, self.img_mlp, self.txt_mlp = Attention(), FeedForward(), FeedForward()

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        self.runs, self.rows = self.runs + 1, self.rows + len(img)
        if not self.in_place:
            img, txt = img.clone(), txt.clone()
        attended = self.attn(torch.cat((txt, img), 1) + vec)  # (rows, TEXT + IMAGE, W)
        txt += attended[:, : txt.shape[1]]
        img += attended[:, txt.shape[1] :]
        img += self.img_mlp(img + vec)
        txt += self.txt_mlp(txt + vec)
        return img, txt


class SingleBlock(nn.Module):
    """Text and image in one sequence; writes in place."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.runs = self.rows = 0
        self.in_place = in_place
        self.attn, self.mlp = Attention(), FeedForward()

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        self.runs, self.rows = self.runs + 1, self.rows + len(x)
        x = x if self.in_place else x.clone()
        x += self.attn(x + vec)
        x += self.mlp(x + vec)
        return x


class Toy(nn.Module):
    """Double blocks, single blocks, a head; with places where the model adds a control signal in place."""

    def __init__(self, doubles: int = 2, singles: int = 3, in_place: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.runs = self.rows = 0
        self.fails_in_block_three = self.adds_embedding_to_head = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.embed_text, self.embed_sigma = nn.Linear(C, W), nn.Linear(C, W), nn.Linear(2, W)
            self.double_blocks = nn.ModuleList(DoubleBlock(in_place) for _ in range(doubles))
            self.single_blocks = nn.ModuleList(SingleBlock(in_place) for _ in range(singles))
            self.head = nn.Linear(W, C)
        self.requires_grad_(False)

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor, control: Tensor | None = None) -> Tensor:
        self.runs, self.rows = self.runs + 1, self.rows + len(latent)
        img, txt = self.embed(latent), self.embed_text(text)  # (rows, IMAGE, W), (rows, TEXT, W)
        embedding = img
        angle = sigma.to(latent.dtype)[:, None, None]
        vec = self.embed_sigma(torch.cat((angle.sin(), angle.cos()), -1))  # (rows, 1, W)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec)
            if control is not None:
                img[:, : control.shape[1]] += control
        x = torch.cat((txt, img), 1)  # (rows, TEXT + IMAGE, W)
        for number, block in enumerate(self.single_blocks):
            if self.fails_in_block_three and number == 1:
                raise RuntimeError("block three fails")
            x = block(x, vec)
            if control is not None:
                x[:, txt.shape[1] : txt.shape[1] + control.shape[1]] += control
        img = x[:, txt.shape[1] :]
        return self.head(img + embedding if self.adds_embedding_to_head else img)  # (rows, IMAGE, C)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def units(self, level: str) -> list[nn.Module]:
        """What a strategy of this level computes or does not."""
        if level == "output":
            return [self]
        if level in ("model", "block"):
            return self.blocks
        if level == "attention":
            return [block.attn for block in self.blocks]
        return [part for block in self.blocks for part in block.children()]

    def runs_of(self, level: str) -> int:
        return sum(unit.runs for unit in self.units(level))

    def rows_of(self, level: str) -> int:
        """How many rows of batches they computed."""
        return sum(unit.rows for unit in self.units(level))


class ThreeKindsBlock(nn.Module):
    """Attention of all three kinds, each in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.self_attn, self.temporal_attn, self.cross_attn = Attention(), Attention(), Attention()

    def forward(self, x: Tensor, text: Tensor, vec: Tensor) -> Tensor:
        self.runs += 1
        x = x + self.self_attn(x + vec)
        x = x + self.temporal_attn(x.flip(1) + vec)
        return x + self.cross_attn(x + vec, text)


class OperationsBlock(Attending):
    """Attends to the picture and to the text without a module for it."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.qkv, self.itself, self.text = nn.Linear(W, 3 * W), Operation(), Operation()

    def forward(self, x: Tensor, text: Tensor, vec: Tensor) -> Tensor:
        self.runs += 1
        x = x + self.attend(self.itself, *self.qkv(x + vec).chunk(3, dim=-1))
        query, (_, key, value) = self.qkv(x)[..., :W], self.qkv(text).chunk(3, dim=-1)
        return x + self.attend(self.text, query, key, value)


class TextBeside(Attending):
    """A list of blocks on the picture alone, the text given to each; refined before, if there are refiners."""

    def __init__(self, block: type[nn.Module], count: int = 3, refiners: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.last = Operation()  # attends after the blocks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.embed_text, self.embed_sigma = nn.Linear(C, W), nn.Linear(C, W), nn.Linear(1, W)
            self.refiners = nn.ModuleList(block() for _ in range(refiners))
            self.blocks = nn.ModuleList(block() for _ in range(count))
            self.head = nn.Linear(W, C)
        self.requires_grad_(False)

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor, control: Tensor | None = None) -> Tensor:
        x, text = self.embed(latent), self.embed_text(text)  # (rows, IMAGE, W), (rows, TEXT, W)
        vec = self.embed_sigma(sigma.to(latent.dtype)[:, None, None])  # (rows, 1, W)
        refined = text
        for block in self.refiners:
            refined = block(refined, text, vec)
        for block in self.blocks:
            x = block(x, refined, vec)
        return self.head(self.attend(self.last, x, x, x))  # (rows, IMAGE, C)


TEXTS = {  # as unlike as two branches can be
    NEGATIVE: -2 * torch.ones(1, TEXT, C),
    POSITIVE: torch.linspace(-3, 3, TEXT * C).reshape(1, TEXT, C),
}


def first_latent(rows: int = 1, tokens: int = IMAGE, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, C, generator=torch.Generator().manual_seed(seed))


def sigmas_of(steps: int, shift: float = 1.0) -> list[float]:
    even = [1 - step / steps for step in range(steps + 1)]
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]


@dataclass
class Sampling:
    """A sampling run of the toy, step by step, with or without a CacheRun around each model call."""

    toy: nn.Module
    strategies: tuple[Strategy, ...] | None = None  # None: no CacheRun at all
    sigmas: list[float] = field(default_factory=lambda: sigmas_of(12))
    layout: str = "joined"  # joined, separate, or alternating between the two from step to step
    control: Tensor | None = None
    branches: tuple[str, ...] = (NEGATIVE, POSITIVE)
    texts: dict[str, Tensor] = field(default_factory=lambda: TEXTS)

    def __post_init__(self) -> None:
        self.run = None if self.strategies is None else CacheRun(self.strategies, Schedule(self.sigmas))

    @property
    def report(self) -> Report:
        self.run.report.close()
        return self.run.report

    def call(self, latents: dict[str, Tensor], sigma: float, names: tuple[str, ...]) -> dict[str, Tensor]:
        """One model call for these branches, joined."""
        latent = torch.cat([latents[name] for name in names])
        text = torch.cat([self.texts[name].to(latent).expand(latents[name].shape[0], -1, -1) for name in names])
        levels = torch.full((len(latent),), sigma)

        def forward() -> Tensor:
            return self.toy(latent, levels, text, self.control)

        contexts = [(name, tuple(latents[name].shape), id(self.toy)) for name in names]
        output = forward() if self.run is None else self.run.call_model(self.toy, forward, levels, contexts, names)
        return dict(zip(names, output.chunk(len(names)), strict=True))

    def predict(self, latents: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """One evaluation of all branches, at one step."""
        if self.run is not None:
            self.run.begin_evaluation()
        return self.calls(latents, index)

    def calls(self, latents: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """The model calls of one evaluation, as many as the layout makes of them."""
        joined = self.layout == "joined" or (self.layout == "alternating" and index % 2 == 1)
        groups = [tuple(latents)] if joined else [(name,) for name in latents]
        return {name: part for names in groups for name, part in self.call(latents, self.sigmas[index], names).items()}

    def call_on(self, latent: Tensor, index: int) -> Tensor:
        """The positive branch's prediction alone, at one step."""
        return self.predict({POSITIVE: latent}, index)[POSITIVE]

    def sample(self, latent: Tensor) -> Tensor:
        """Euler's steps, guided by both branches."""
        for index in range(len(self.sigmas) - 1):
            predicted = self.predict(dict.fromkeys(self.branches, latent), index)
            velocity = 2 * predicted[POSITIVE] - predicted[NEGATIVE] if NEGATIVE in predicted else predicted[POSITIVE]
            latent = latent + (self.sigmas[index + 1] - self.sigmas[index]) * velocity
        return latent


@dataclass
class GuidedSampling(Sampling):
    """Leaves it to the run whether the negative branch is called. Its predictions are pictures, (rows, C, *PICTURE)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked: list[tuple[str, ...]] = []  # the branches that were asked for, request by request

    def predict(self, latents: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        def predictions(*wanted: bool) -> list[Tensor | None]:
            names = [name for name, is_wanted in zip((POSITIVE, NEGATIVE), wanted, strict=True) if is_wanted]
            self.asked.append(tuple(names))
            outputs = self.calls({name: latents[name] for name in self.branches if name in names}, index)
            return [self.picture_of(outputs[name]) if name in outputs else None for name in (POSITIVE, NEGATIVE)]

        self.run.begin_evaluation()
        sigma = torch.full((1,), self.sigmas[index])
        positive, negative = self.run.call_guidance(self.toy, predictions, sigma, NEGATIVE, NEGATIVE)
        return {NEGATIVE: self.tokens_of(negative), POSITIVE: self.tokens_of(positive)}

    def picture_of(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, PICTURE)

    def tokens_of(self, prediction: Tensor) -> Tensor:
        return prediction.flatten(2).transpose(1, 2)


def reused_by_hand(steps: int, skip_range: int, start: int, end: int) -> list[int]:
    """The steps of an even schedule in which a value stands in, computed once in so many steps within a window."""
    reused, since = [], 0
    for index in range(steps):
        timestep = round(1000 * (steps - index) / steps)
        since = since + 1 if index and start < timestep < end and since + 1 < skip_range else 0
        reused += [index] if since else []
    return reused


def uncached(toy: nn.Module, latent: Tensor, **settings: Any) -> Tensor:
    return Sampling(toy, None, **settings).sample(latent)


@cache
def reference() -> Tensor:
    """What a new toy makes of the first latent without any cache: two branches, joined, twelve even steps."""
    return uncached(Toy(), first_latent())


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def differing(latents: Tensor) -> dict[str, Tensor]:
    """Very different latents for the two branches, which are then sampled side by side without guidance."""
    return {NEGATIVE: latents, POSITIVE: 3 - 2 * latents}


def side_by_side(sampling: Sampling, latents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each branch follows its own prediction."""
    for index in range(len(sampling.sigmas) - 1):
        predicted = sampling.predict(latents, index)
        step = sampling.sigmas[index + 1] - sampling.sigmas[index]
        latents = {name: latent + step * predicted[name] for name, latent in latents.items()}
    return latents


@dataclass(frozen=True)
class ReuseAlways(Strategy):
    """Reuses whatever there is, once there is something. For tests that force reuse."""

    title = "Reuse Always"
    level: str = "model"

    @property
    def levels(self) -> tuple[str, ...]:
        return (self.level,)

    def new_state(self, site) -> History:
        return History(capacity=1)

    def around(self, call: Any, state: History) -> Any:
        if call.may_reuse:
            return state.combined([1.0])
        state.add(call.step.time, (yield COMPUTE))


@dataclass(frozen=True)
class EverySecondStep(Strategy):
    """The example of cache_core/strategy.py."""

    title = "Every Second Step"
    levels = ("output",)

    def new_state(self, site):
        return History(capacity=1)

    def around(self, call, state):
        if call.may_reuse and call.step.index % 2:
            return state.combined([1.0])
        output = yield COMPUTE
        state.add(call.step.time, output)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors reachable from a state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for item in value.values() for tensor in tensors_in(item))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for item in value for tensor in tensors_in(item))
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def traces_on(model: nn.Module) -> list[str]:
    """Modules whose instance carries a forward of its own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def alive(references: list) -> int:
    """How many of the objects referred to still live."""
    if any(reference() is not None for reference in references):
        gc.collect()
    return sum(reference() is not None for reference in references)
