"""Which tokens of the streams are the sound's, and which are each frame's: found by changing the latent there.

A video's latent may be of two tensors, picture and sound. Some models carry them in two streams (LTX-2), others one
after the other in one sequence, behind the text (MiniMax-H3). Nothing says so but what another latent changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..strategy.tensors import ENOUGH_TOKENS
from .chains import BlockPlan
from .rehearsal import Stage, performed, with_another_latent
from .structure import flattened, is_feature

FEWEST_OF_A_FRAME = 16  # tokens that are looked at, times channels
FRAMES_AXIS = 2  # of a video's latent: (rows, channels, frames, height, width)


@dataclass(frozen=True, eq=False)
class Part:
    """The tokens that one tensor of the latent becomes in one stream, frame by frame where it has frames."""

    stream: int
    places: Tensor  # (frames, tokens of each that are looked at)
    sizes: tuple[int, ...]  # of the stream, but for its rows

    @property
    def frames(self) -> int:
        """How many can be told apart."""
        return len(self.places)

    def is_all_of(self, tokens: int) -> bool:
        """Whether its so many tokens are the whole stream, and one frame: its mean is then the stream's."""
        return self.frames == 1 and tokens == prod(self.sizes[:-1])

    def fits(self, stream: Tensor, branches: int) -> bool:
        """Whether the stream is as it was when the part was found; packed rows must be of one branch."""
        return self.sizes == tuple(stream.shape[stream.ndim > 2 :]) and (stream.ndim > 2 or branches == 1)

    def of(self, stream: Tensor) -> Tensor:
        """Its tokens, (rows * frames, tokens, channels)."""
        if stream.ndim == 2:
            return stream[self.places]
        places = torch.unravel_index(self.places, stream.shape[1:-1])
        return stream[(slice(None), *places)].flatten(0, 1)


def parts_in(streams: Sequence[Tensor], parts: Sequence[Part], branches: int) -> list[Tensor]:
    """What is looked at of the parts, in streams as they were when these were found."""
    return [part.of(streams[part.stream]) for part in parts if part.fits(streams[part.stream], branches)]


def parts_of(plan: BlockPlan, stage: Stage) -> tuple[Part, ...]:
    """The parts of what enters the chain that leads; none where they can't be told apart.

    Costs what of the model always runs, once for each tensor of the latent and once for each that has frames.
    """
    shapes: list[torch.Size] = []
    found, number = [], 0
    while number == 0 or number < len(shapes):
        changed = _changed(plan, stage, number, shapes, only_first_frame=False)
        first = {}
        if number < len(shapes) and len(shapes[number]) == 5 and shapes[number][FRAMES_AXIS] > 1:
            first = _changed(plan, stage, number, shapes, only_first_frame=True)
        found += [_part(plan, stage, stream, tokens, first.get(stream)) for stream, tokens in changed.items()]
        number += 1
    for stream in {part.stream for part, _ in found}:
        tokens = torch.cat([tokens for part, tokens in found if part.stream == stream])
        if len(tokens.unique()) < len(tokens):
            return ()  # some come of two tensors of the latent
    main = plan.chains[0].main
    return tuple(part for part, tokens in found if part.stream != main or not part.is_all_of(len(tokens)))


def _changed(
    plan: BlockPlan, stage: Stage, number: int, shapes: list[torch.Size], only_first_frame: bool
) -> dict[int, Tensor]:
    """Which tokens of each stream change on entering when this tensor of the latent does. Waits for the device."""

    def other(latent: object) -> object:
        features, structure = flattened(latent)
        shapes[:] = [feature.shape for feature in features]
        if number >= len(features):
            return latent
        changed = 0.7 * features[number].flip(-1) + 0.1
        if only_first_frame:
            rest = features[number].narrow(FRAMES_AXIS, 1, features[number].shape[FRAMES_AXIS] - 1)
            changed = torch.cat((changed.narrow(FRAMES_AXIS, 0, 1), rest), FRAMES_AXIS)
        return structure.filled_with([*features[:number], changed, *features[number + 1 :]])

    around = partial(with_another_latent, stage.lesson.model, other)
    rehearsal = performed(plan, stage, around, _sizes)
    if not (rehearsal.is_as_learned and rehearsal.entered):
        return {}
    chain, before = plan.chains[0], stage.lesson.streams_of(plan.chains[0]).entered
    given = chain.wirings[0].gives
    changed = {}
    for stream, (now, was) in enumerate(zip(rehearsal.entered, before)):
        if was is not None and is_feature(was) and given[stream] is not None:
            differs = now != _sizes(was)
            differs = differs if was.ndim == 2 else differs.flatten(1).any(0)
            if len(places := differs.nonzero().flatten()):
                changed[stream] = places
    return changed


def _part(plan: BlockPlan, stage: Stage, stream: int, tokens: Tensor, first: Tensor | None) -> tuple[Part, Tensor]:
    """The part of these tokens, in as many frames as the tokens of the first one go into them, evenly and in order."""
    shape = stage.lesson.streams_of(plan.chains[0]).given[stream].shape
    frames = 1
    if first is not None and len(tokens) % len(first) == 0 and torch.equal(first, tokens[: len(first)]):
        frames = len(tokens) // len(first)
    by_frame = tokens.reshape(frames, -1)
    enough = max(ENOUGH_TOKENS // frames, FEWEST_OF_A_FRAME)
    places = by_frame[:, :: max(by_frame.shape[1] // enough, 1)].contiguous()
    return Part(stream, places, tuple(shape[len(shape) > 2 :])), tokens


def _sizes(stream: Tensor) -> Tensor:
    """A number for each token, (rows, ...) or (tokens): another token gives another."""
    if not is_feature(stream):
        return stream
    return torch.linalg.vector_norm(stream, dim=-1, dtype=torch.promote_types(stream.dtype, torch.float32))
