"""Which lists of modules are chains of blocks, learned from one ordinary call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..strategy.tensors import Features, copied
from .chains import BlockPlan, Chain, TensorKind, Wiring, block_lists, weights_in
from .compiled import entry_of, uncompiled
from .hooks import Around, HookRegistry
from .structure import Path, Structure, flattened, is_tensor, tensors_in

SMALLEST_SHARE = 0.1  # of the parameters in all chains: refiners and heads below it cost next to nothing
LEAST_OF_MODEL = 0.5  # of the parameters in all lists in use: a U-Net's transformers are not what it consists of
FEWEST_TOKENS = 0.25  # of the longest chain's: a text refiner says little about the picture and must not lead
NO_CHAIN = "most of the model is no chain of blocks; it may be a U-Net"


@dataclass
class _Ran:
    """One block's run, as far as linking it to the next needs it."""

    index: int
    began: int
    inside: str | None  # the candidate list whose block was running
    took: dict[Path, Tensor]  # dropped once the next block has run, but for their kind
    links: list[tuple[Path, Path]] = field(default_factory=list)  # (where the block before gave it, where we took it)
    gave: dict[Path, Tensor] = field(default_factory=dict)  # dropped likewise
    kinds_taken: dict[Path, TensorKind] = field(default_factory=dict)
    kinds_given: dict[Path, TensorKind] = field(default_factory=dict)
    entered: dict[Path, Tensor] = field(default_factory=dict)  # first block: copies of what it took and passes on
    left: dict[Path, Tensor] = field(default_factory=dict)  # first and last block: copies of what it gave
    returns: Structure | None = None

    @property
    def foreign(self) -> set[int]:
        """Ids of the tensors that went in and did not come out."""
        return {id(tensor) for tensor in self.took.values()} - {id(tensor) for tensor in self.gave.values()}


@dataclass(frozen=True)
class ChainStreams:
    """The streams of one chain in the call that was learned from; copies."""

    entered: tuple[Tensor, ...]
    after_first: tuple[Tensor | None, ...]
    left: Features  # those that leave the chain


class Lesson:
    """Watches one ordinary call of a model. Use `with lesson.watching():` around it, then `lesson.plan()`."""

    def __init__(self, model: nn.Module, methods: Mapping[str, str], is_compiled: bool = False) -> None:
        self.lists, self.methods, self.is_compiled = dict(block_lists(model)), methods, is_compiled
        self.runs: dict[str, list[_Ran]] = {name: [] for name in self.lists}
        self._used: set[str] = set()  # lists something of which ran, be it not through the blocks' forward
        self._running: list[str] = []
        self._clock = 0

    def watching(self) -> HookRegistry:
        """Hooks that watch; they change nothing."""
        hooks = HookRegistry()
        for name, blocks in self.lists.items():
            for index, block in enumerate(blocks.values()):
                hooks.add(block, self._watch(name, index), self._method_of(block))
                if self.is_compiled:  # a hook on something in the block would be compiled with it
                    hooks.add(block, self._use(name), self._method_of(block))
                else:
                    hooks.add(_first_leaf(block), self._use(name))
        return hooks

    def plan(self) -> BlockPlan:
        """What the call taught."""
        chains, notes = [], []
        for name, blocks in sorted(self.lists.items(), key=lambda item: [ran.began for ran in self.runs[item[0]]][:1]):
            chain = self._chain(name, blocks)
            if isinstance(chain, Chain):
                chains.append(chain)
            elif self.runs[name] and not any(ran.inside for ran in self.runs[name]):
                notes.append(f"{name} always runs: {chain}")
        plan = BlockPlan(tuple(chains), tuple(notes))
        weights = {name: sum(map(weights_in, blocks.values())) for name, blocks in self.lists.items()}
        in_chains = sum(weights[chain.name] for chain in chains)
        small = [chain for chain in chains if weights[chain.name] < SMALLEST_SHARE * in_chains]
        plan = plan.without(small, "it is small")
        most = max((chain.main_size for chain in plan.chains), default=0)
        text = [chain for chain in plan.chains if chain.main_size < FEWEST_TOKENS * most]
        plan = plan.without(text, "it works on few tokens, a text's probably")
        in_use = sum(weights[name] for name in self._used)
        if sum(weights[chain.name] for chain in plan.chains) < LEAST_OF_MODEL * in_use:
            return BlockPlan(notes=(NO_CHAIN,) if plan.chains else plan.notes)
        return plan

    def streams_of(self, chain: Chain) -> ChainStreams:
        """What went through this chain."""
        first, last = self.runs[chain.name][0], self.runs[chain.name][-1]
        return ChainStreams(
            entered=tuple(first.entered[path] for path in chain.wirings[0].takes),
            after_first=tuple(first.left.get(path) for path in chain.wirings[0].gives),
            left=tuple(last.left[chain.wirings[-1].gives[stream]] for stream in chain.ends),
        )

    def _use(self, name: str) -> Around:
        def use(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._used.add(name)
            return forward(*args, **kwargs)

        return use

    def _watch(self, name: str, index: int) -> Around:
        is_first, is_last = index == 0, index == len(self.lists[name]) - 1

        def watch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = self.runs[name][-1] if self.runs[name] else None
            ran = _Ran(index, self._clock, self._running[-1] if self._running else None, tensors_in((args, kwargs)))
            self._clock += 1
            ran.kinds_taken = _kinds(ran.took)
            if before is not None:
                ran.links = _links(before.gave, ran.took, before.foreign)
            entered = _copies(ran.took) if is_first else {}
            self._running.append(name)
            try:
                output = forward(*args, **kwargs)
            finally:
                self._running.pop()
            if before is not None:
                before.took, before.gave = {}, {}
            ran.gave, ran.returns = tensors_in(output), flattened(output, is_tensor)[1]
            ran.kinds_given = _kinds(ran.gave)
            passed_on = set(ran.kinds_given.values())
            ran.entered = {path: copy for path, copy in entered.items() if ran.kinds_taken[path] in passed_on}
            ran.left = _copies(ran.gave) if is_first or is_last else {}
            self.runs[name].append(ran)
            return output

        return watch

    def _chain(self, name: str, blocks: dict[str, nn.Module]) -> Chain | str:
        """The list as a chain, or why it is none."""
        runs = self.runs[name]
        if [ran.index for ran in runs] != list(range(len(blocks))):
            return "its blocks do not each run once, in order"
        if any(ran.inside for ran in runs):
            return "it runs inside another block"
        if len(runs) == 1:  # a single block: it would feed another one like itself
            runs[0].links = _links(runs[0].gave, runs[0].took, foreign=set(), takes_first=True)
        linked = runs[1:] or runs
        votes = Counter(link for ran in linked for link in ran.links)
        streams = sorted(
            (link for link, count in votes.items() if 2 * count >= len(linked)),
            key=lambda link: [str(key) for key in link[0]],
        )
        streams = [(gives, takes) for gives, takes in streams if all(takes in ran.kinds_taken for ran in runs)]
        features = [stream for stream, (_, takes) in enumerate(streams) if _is_features(runs[0].kinds_taken[takes])]
        if not features or len({takes for _, takes in streams}) < len(streams):
            return "its blocks do not feed each other"
        kinds = [(ran.kinds_taken[takes], ran.kinds_given.get(gives)) for ran in runs for gives, takes in streams]
        if any(given not in (None, taken) for taken, given in kinds):
            return "its blocks change the shape or the type of what they pass on"
        passed_on = {gives for gives, _ in streams}
        if any(len(ran.kinds_given) != ran.returns.tensor_count for ran in runs):
            return "its blocks return something that can't be read"
        wirings = tuple(
            Wiring(
                takes=tuple(takes for _, takes in streams),
                gives=tuple(gives if gives in ran.kinds_given else None for gives, _ in streams),
                extras={path: kind for path, kind in ran.kinds_given.items() if path not in passed_on},
                order=tuple(ran.kinds_given),
                returns=ran.returns,
                arguments=frozenset(ran.kinds_taken),
            )
            for ran in runs
        )
        sizes = {stream: runs[0].kinds_taken[streams[stream][1]][0].numel() for stream in features}
        main = max(features, key=sizes.__getitem__)
        return Chain(
            name=name,
            blocks=tuple(blocks.values()),
            names=tuple(f"{name}.{key}" for key in blocks),
            wirings=wirings,
            main=main,
            main_size=sizes[main],
            ends=tuple(stream for stream in features if wirings[-1].gives[stream] is not None),
            methods=tuple(map(self._method_of, blocks.values())),
        )

    def _method_of(self, block: nn.Module) -> str:
        return entry_of(block, self.methods.get(type(uncompiled(block)).__name__, "forward"))


def _kinds(tensors: dict[Path, Tensor]) -> dict[Path, TensorKind]:
    return {path: (tensor.shape, tensor.dtype) for path, tensor in tensors.items()}


def _is_features(kind: TensorKind) -> bool:
    return kind[1].is_floating_point


def _copies(tensors: dict[Path, Tensor]) -> dict[Path, Tensor]:
    return {path: copied([tensor])[0] for path, tensor in tensors.items()}


def _links(
    given: dict[Path, Tensor], taken: dict[Path, Tensor], foreign: set[int], takes_first: bool = False
) -> list[tuple[Path, Path]]:
    """Which input each tensor given by the block before arrives at: the same object, else the only one alike.

    `foreign` are the ids of those that have not come from it. With `takes_first`, of several alike it is the first.
    """
    ways = {id(tensor): path for path, tensor in reversed(taken.items())}
    links = {gives: ways[id(tensor)] for gives, tensor in given.items() if id(tensor) in ways}
    for gives, tensor in given.items():
        alike = [
            path
            for path, other in taken.items()
            if (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
            and path not in links.values()
            and id(other) not in foreign
        ]
        if gives not in links and (len(alike) == 1 or (alike and takes_first)):  # LTX's positions look like its tokens
            links[gives] = alike[0]
    return list(links.items())


def _first_leaf(block: nn.Module) -> nn.Module:
    """The first module in a block that has weights of its own, or the block itself."""
    leaves = (module for module in block.modules() if any(True for _ in module.parameters(recurse=False)))
    return next(leaves, block)
