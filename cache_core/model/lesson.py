"""Which lists of modules are chains of blocks, learned from one ordinary call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..strategy.tensors import Features, sampled_tokens
from .chains import BlockPlan, Chain, block_lists, weights_in
from .compiled import method_of
from .hooks import Forward, Hook
from .links import BlockRun, Unlinked, copies_of, features_of, streams_through
from .structure import Path, tensors_in

SMALLEST_SHARE = 0.1  # of the parameters in all chains: refiners and heads below it cost next to nothing
LEAST_OF_MODEL = 0.5  # of the parameters in all lists in use: a U-Net's transformers are not what it consists of
FEWEST_TOKENS = 0.25  # of the longest chain's: a text refiner says little about the picture and must not lead
NO_CHAIN = "most of the model is no chain of blocks; it may be a U-Net"


@dataclass(frozen=True)
class ChainStreams:
    """The streams of one chain in the call that was learned from: copies of what was asked for, None of the rest."""

    given: tuple[Tensor, ...]  # what entered, as shapes and types: on the meta device
    seen: tuple[Tensor, ...]  # some tokens of it
    entered: tuple[Tensor | None, ...]
    after_first: tuple[Tensor | None, ...]
    left: Features  # those that leave the chain


class Lesson:
    """Watches one ordinary call of a model. Put `lesson.watching()` on it, then ask for `lesson.plan()`.

    `starts` says where residuals will start: "entered", "after first" or both. If there is none, nothing is copied.
    """

    def __init__(
        self, model: nn.Module, methods: Mapping[str, str], is_compiled: bool = False, starts: Collection[str] = ()
    ) -> None:  # fmt: skip
        self.model, self.methods, self.is_compiled, self.starts = model, methods, is_compiled, starts
        self.lists = dict(block_lists(model))
        self.returned: list[Any] = []  # by the model
        self.runs: dict[str, list[BlockRun]] = {}  # of the blocks of each list, in the order in which lists begin
        self.given: dict[str, dict[Path, Tensor]] = {}  # by list: what the first block took, without its values
        self.seen: dict[str, dict[Path, Tensor]] = {}  # copies of some of its tokens
        self.took: dict[str, dict[Path, Tensor]] = {}  # copies of all of it
        self.gave: dict[tuple[str, int], dict[Path, Tensor]] = {}  # copies: what the first and the last block gave
        self._used: set[str] = set()  # lists something of which ran, be it not through the blocks' forward
        self._running: list[str] = []

    def watching(self) -> list[Hook]:
        """Hooks that watch; they change nothing."""
        hooks = []
        for name, blocks in self.lists.items():
            for index, block in enumerate(blocks.values()):
                hooks.append(Hook(block, partial(self._watch, name, index), self._method_of(block)))
                if self.is_compiled:  # a hook on something in the block would be compiled with it
                    hooks.append(Hook(block, partial(self._use, name), self._method_of(block)))
                else:
                    hooks.append(Hook(_first_leaf(block), partial(self._use, name)))
        return [*hooks, Hook(self.model, partial(noting, self.returned))]

    def plan(self) -> BlockPlan:
        """What the call taught."""
        chains, notes = [], []
        for name, runs in self.runs.items():
            try:
                chains.append(self._chain(name, self.lists[name]))
            except Unlinked as why:
                notes += [] if any(run.inside for run in runs) else [f"{name} always runs: {why}"]
        plan = BlockPlan(tuple(chains), tuple(notes))
        weights = {name: sum(map(weights_in, blocks.values())) for name, blocks in self.lists.items()}
        in_chains = sum(weights[chain.name] for chain in chains)
        small = [chain for chain in chains if weights[chain.name] < SMALLEST_SHARE * in_chains]
        plan = plan.without(small, "it is small")
        most = max((chain.main_size for chain in plan.chains), default=0)
        text = [chain for chain in plan.chains if chain.main_size < FEWEST_TOKENS * most]
        plan = plan.without(text, "it works on few tokens")
        in_use = sum(weights[name] for name in self._used)
        if sum(weights[chain.name] for chain in plan.chains) < LEAST_OF_MODEL * in_use:
            return BlockPlan(notes=(NO_CHAIN,) if plan.chains else plan.notes)
        return plan

    @property
    def ran_in_turns(self) -> bool:
        """Whether blocks that are most of the model ran several times each, one block after the other.

        As for a prefix of text and reference tokens, and then for the picture, in the first call of a prompt.
        """
        in_use = sum(sum(map(weights_in, self.lists[name].values())) for name in self._used)
        for name, runs in self.runs.items():
            count, rest = divmod(len(runs), len(self.lists[name]))
            in_turns = [index for index in range(len(self.lists[name])) for _ in range(count)]
            if count > 1 and not rest and [run.index for run in runs] == in_turns:
                return sum(map(weights_in, self.lists[name].values())) >= LEAST_OF_MODEL * in_use
        return False

    def streams_of(self, chain: Chain) -> ChainStreams:
        """What went through this chain."""
        name, takes = chain.name, chain.wirings[0].takes
        first, last = self.gave.get((name, 0), {}), self.gave[name, len(chain.blocks) - 1]
        return ChainStreams(
            given=tuple(self.given[name][path] for path in takes),
            seen=tuple(self.seen[name][path] for path in takes),
            entered=tuple(self.took[name].get(path) for path in takes),
            after_first=tuple(first.get(path) for path in chain.wirings[0].gives),
            left=tuple(last[chain.wirings[-1].gives[stream]] for stream in chain.ends),
        )

    def _use(self, name: str, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        self._used.add(name)
        return forward(*args, **kwargs)

    def _watch(self, name: str, index: int, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        is_first, is_last = index == 0, index == len(self.lists[name]) - 1
        runs = self.runs.setdefault(name, [])
        run = BlockRun(index, self._running[-1] if self._running else None, tensors_in((args, kwargs)))
        for before in runs[-1:]:
            run.link(before)
        if is_first and self.starts:
            self._begin(name, run.took)
        self._running.append(name)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._running.pop()
        for before in runs[-1:]:
            before.forget()
        run.give(output)
        if is_first and self.starts:
            passed_on = set(run.kinds_given.values())
            took = self.took[name].items()
            self.took[name] = {path: copy for path, copy in took if run.kinds_taken[path] in passed_on}
        if self.starts and (is_last or (is_first and "after first" in self.starts)):
            self.gave[name, index] = copies_of(run.gave)
        runs.append(run)
        return output

    def _begin(self, name: str, took: dict[Path, Tensor]) -> None:
        """A list begins with what its first block took. The residual of the first list may start behind that block."""
        self.given[name] = {path: tensor.detach().to("meta") for path, tensor in took.items()}
        self.seen[name] = copies_of({path: sampled_tokens(tensor) for path, tensor in took.items()})
        is_whole = "entered" in self.starts or name != next(iter(self.runs)) or len(self.lists[name]) == 1
        self.took[name] = copies_of(took) if is_whole else {}

    def _chain(self, name: str, blocks: dict[str, nn.Module]) -> Chain:
        """The list as a chain. Raises `Unlinked` if it is none."""
        runs = self.runs[name]
        streams = streams_through(runs, len(blocks))
        wirings, sizes = tuple(run.wiring(streams) for run in runs), features_of(streams, runs[0])
        main = max(sizes, key=sizes.__getitem__)
        return Chain(
            name=name,
            blocks=tuple(blocks.values()),
            names=tuple(f"{name}.{key}" for key in blocks),
            wirings=wirings,
            main=main,
            main_size=sizes[main],
            ends=tuple(stream for stream in sizes if wirings[-1].gives[stream] is not None),
            methods=tuple(map(self._method_of, blocks.values())),
        )

    def _method_of(self, block: nn.Module) -> str:
        return method_of(block, self.methods)


def noting(returned: list[Any], forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
    """A module's forward, and what it returns goes on a list."""
    returned.append(forward(*args, **kwargs))
    return returned[-1]


def _first_leaf(block: nn.Module) -> nn.Module:
    """The first module in a block that has weights of its own, or the block itself."""
    leaves = (module for module in block.modules() if any(True for _ in module.parameters(recurse=False)))
    return next(leaves, block)
