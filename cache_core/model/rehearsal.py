"""The rehearsal: before a plan is used, its blocks are left out once as a test.

A plan that was misread would make every reused call a wrong picture. The rehearsal costs embedding, head and what else
of the model always runs, once or twice a run, and waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..strategy import copied, same_layout, sampled_tokens
from .chains import BlockPlan
from .compiled import uncompiled
from .failures import is_of_the_device
from .hooks import Forward, Hook
from .lesson import Lesson, noting
from .structure import flattened, is_feature

NO_NUMBER = "the model's output holds NaN or infinity"
SHAPES_CHANGE = "their shapes change"
MOST_ERROR = 0.01  # of the output's norm: a plan read right gives 0 but for kernels that vary
SMALLEST_NORM = 1e-12  # two outputs of zeros are alike


@dataclass(frozen=True)
class Stage:
    """What a rehearsal needs of the call that was learned from."""

    lesson: Lesson
    perform: Callable[[list[Hook]], None]  # makes that call once more, with these hooks
    largest: Callable[[Sequence[float]], list[float]]  # of each number among all ranks: they must find the same
    on_blocks_left_out: Callable[[], None] | None = None
    cancels: tuple[type[BaseException], ...] = ()  # what ends a run because somebody wants it


def rehearse(plan: BlockPlan, stage: Stage) -> tuple[BlockPlan, str | None, bool]:
    """Put a plan to the test, and drop the chains that must not be in it.

    Returns the plan that may be used, why its chains must not be left out all the same, if so, and whether that is
    certain: a model may only be different in its first call.
    """
    plan, error = _tested(_led_by_what_sees_the_latent(plan, stage), stage)
    if error <= MOST_ERROR:
        return plan, None, True
    if error < inf:
        return plan, f"leaving them out changed the output by {error:.1%}", True
    finite = all(bool(torch.isfinite(feature).all()) for feature in flattened(stage.lesson.returned)[0])
    return plan, SHAPES_CHANGE if finite else NO_NUMBER, False


def _led_by_what_sees_the_latent(plan: BlockPlan, stage: Stage) -> BlockPlan:
    """The first chain decides about reuse, by its main stream: the largest of those that another latent changes on
    entering. A text's may be larger. A chain in which it changes none works on the prompt.
    """
    while len(plan.chains) > 1 or len(_features_entering(plan, stage)) > 1:
        rehearsal = performed(plan, stage, partial(with_another_latent, stage.lesson.model, _another))
        for stream in _features_entering(plan, stage):
            if any(stage.largest([rehearsal.entered_changed(stream)])):
                return _with_main(plan, stream)
        if len(plan.chains) == 1:
            break
        plan = plan.without([plan.chains[0]], "it does not see the latent")
    return plan


def _features_entering(plan: BlockPlan, stage: Stage) -> list[int]:
    """The streams that enter the chain that leads and can be measured, the largest first on all ranks."""
    given = stage.lesson.streams_of(plan.chains[0]).given
    sizes = stage.largest([float(stream.numel()) if is_feature(stream) else 0.0 for stream in given])
    return sorted((number for number, size in enumerate(sizes) if size), key=lambda number: -sizes[number])


def _with_main(plan: BlockPlan, main: int) -> BlockPlan:
    leading, *others = plan.chains
    return replace(plan, chains=(replace(leading, main=main), *others))


def _tested(plan: BlockPlan, stage: Stage) -> tuple[BlockPlan, float]:
    """The first way of leaving blocks out that does no harm, and by how much the output is off; else the last tried."""
    plans, error = [plan, replace(plan, runs_first=True)], inf
    if returning_more := [chain for chain in plan.chains if chain.has_extras]:
        plans.append(plan.without(returning_more, "its blocks return more than they pass on"))
    for plan in plans:
        if plan.chains:
            plan, error = _error_of(plan, stage)
            if error <= MOST_ERROR:
                break
    return plan, error


def _error_of(plan: BlockPlan, stage: Stage) -> tuple[BlockPlan, float]:
    """The plan without chains that can't be tested, and the relative error of the output without the others."""
    returned: list[Any] = []
    rehearsal = performed(plan, stage, partial(noting, returned))
    misled = stage.largest([chain in rehearsal.misled for chain in range(len(plan.chains))])
    if any(misled):
        chains = [chain for chain, is_misled in zip(plan.chains, misled) if is_misled]
        why = "it begins amid blocks that are skipped, and takes what they give"
        return _error_of(plan.without(chains, why), stage)
    error = relative_error(returned, stage.lesson.returned) if rehearsal.is_as_learned else inf
    return plan, stage.largest([error])[0]


def performed(
    plan: BlockPlan, stage: Stage, around_model: Callable[..., Any], look: Callable[[Tensor], Tensor] = sampled_tokens
) -> Rehearsal:
    """The call without its blocks. Whatever it raises says that the plan was misread, but cancels and device errors.

    `look` takes what is wanted of each stream that enters the chain that leads.
    """
    rehearsal = Rehearsal(plan, stage, look)
    try:
        stage.perform([*plan.along(rehearsal.block), Hook(stage.lesson.model, around_model)])
    except Exception as failure:
        if isinstance(failure, stage.cancels) or is_of_the_device(failure):
            raise
        rehearsal.is_as_learned = False
    return rehearsal


class Rehearsal:
    """Passes through the chains without computing anything: each gives what it gave in the call learned from."""

    def __init__(self, plan: BlockPlan, stage: Stage, look: Callable[[Tensor], Tensor]) -> None:
        self.plan, self.look, self.on_blocks_left_out = plan, look, stage.on_blocks_left_out
        self.learned = [stage.lesson.streams_of(chain) for chain in plan.chains]
        self.entered: list[Tensor] = []  # what was looked at of the streams that entered the chain that leads
        self.running: set[int] = set()  # chains that have begun and not ended
        self.misled: set[int] = set()  # chains that begin amid another, with what its skipped blocks did not make
        self.is_as_learned = True

    def entered_changed(self, stream: int) -> bool:
        """Whether the chain that leads was given another than in the call learned from. Waits for the device."""
        return (
            not self.is_as_learned
            or not self.entered
            or not torch.equal(self.entered[stream], self.learned[0].seen[stream])
        )

    def block(self, chain: int, index: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """Stands in for one block's forward."""
        members, learned = self.plan.chains[chain], self.learned[chain]
        streams = members.wirings[index].streams_in(args, kwargs)
        if index == 0:
            self.is_as_learned &= same_layout(streams, learned.given)
            if self.running and not all(map(torch.equal, map(sampled_tokens, streams), learned.seen)):
                self.misled.add(chain)
            self.running.add(chain)
            streams = list(copied(streams))
            if chain == 0 and self.plan.runs_first:
                forward(*args, **kwargs)
            if chain == 0:
                self.entered = list(copied([self.look(stream) for stream in streams]))
                if self.on_blocks_left_out is not None:
                    self.on_blocks_left_out()
        if index == len(members.blocks) - 1:
            self.running.discard(chain)
            for stream, value in zip(members.ends, copied(learned.left)):
                streams[stream] = value
        return members.wirings[index].returned(streams)


def _another(latent: Any) -> Any:
    return tree_map(lambda leaf: 0.7 * leaf.flip(-1) + 0.1 if is_feature(leaf) else leaf, latent)


def with_another_latent(
    model: nn.Module, other: Callable[[Any], Any], forward: Forward, /, *args: Any, **kwargs: Any
) -> Any:
    """The model, given another latent: its first argument, in whatever order they are named."""
    if args:
        return forward(other(args[0]), *args[1:], **kwargs)
    parameters = inspect.signature(type(uncompiled(model)).forward).parameters
    latent = next((name for name in (*parameters, *kwargs) if name in kwargs), None)
    return forward(**{name: other(value) if name == latent else value for name, value in kwargs.items()})


def relative_error(some: Any, reference: Any) -> float:
    """|some - reference| / |reference|, the largest of all features of two outputs alike. Waits for the device.

    NaN, outputs without features, and features of other shapes or places count as infinite.
    """
    given, wanted = flattened(some)[0], flattened(reference)[0]
    if [(each.shape, each.device) for each in given] != [(each.shape, each.device) for each in wanted]:
        return inf
    errors = [
        (a.detach().float() - b.detach().float()).norm() / b.detach().float().norm().clamp_min(SMALLEST_NORM)
        for a, b in zip(given, wanted)
    ]
    error = torch.stack(errors).max().item() if errors else inf
    return error if error == error else inf
