"""What is known of the models of a run: their chains of blocks, and where strategies step in at them."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import get_args

from torch import nn

from ..model import (
    INSIDE,
    BlockPlan,
    Compilation,
    Counter,
    Work,
    block_lists,
    is_attention,
    kind_of,
    own_name,
    uncompiled,
)
from ..strategy import AttentionKind, Site, Strategy

MOST_LESSONS = 4  # two branches of a prompt, twice
MOST_FIRST_CALLS = 32  # entries of prompts, or context windows, all in the first evaluation
Sites = list[tuple[nn.Module, Site]]


class KnownModel:
    """One model: its chains of blocks, as far as they are known, and what strategies do there."""

    def __init__(
        self, model: nn.Module, strategies: Sequence[Strategy], methods: Mapping[str, str], lock: threading.RLock
    ) -> None:
        self.module, self.compilation, self.lock = model, Compilation(model), lock
        self.work, self.counter = Work(model, methods), Counter()
        self.plan, self.is_learned = BlockPlan(), False  # no chains until they are learned
        lists = block_lists(model)  # of blocks, perhaps
        blocks = ((f"{name}.{key}", block) for name, members in lists for key, block in members.items())
        self.sites = ModelSites(blocks, strategies)
        self._strategies, self._lessons = strategies, 0
        self.shares: dict[str, float] = {}  # of its work, of what may be left out, by name; known once it is learned
        self.costs: dict[Strategy, float] = {}  # of a call in which a strategy reuses

    def learn(self, plan: BlockPlan) -> None:
        """These are its chains."""
        self.plan, self.is_learned = plan, True
        blocks = (item for chain in plan.chains for item in zip(chain.names, chain.blocks))
        self.sites = ModelSites(blocks, self._strategies)

    def may_learn_again(self, is_first: bool) -> bool:
        """One lesson taught nothing. Whether to try once more: a model may only be different in its first call.

        Or in that of each branch: in the first evaluation all calls are.
        """
        self._lessons += 1
        return self._lessons < (MOST_FIRST_CALLS if is_first else MOST_LESSONS)


class ModelSites:
    """Where strategies step in on their own: at a model's blocks, and at modules inside them."""

    def __init__(self, blocks: Iterable[tuple[str, nn.Module]], strategies: Sequence[Strategy]) -> None:
        self._blocks, self._strategies = blocks, strategies

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by name."""
        return dict(self._blocks)

    @cached_property
    def of(self) -> dict[Strategy, list[tuple[nn.Module, Site]]]:
        """The sites of each strategy."""
        return {strategy: list(self._sites_of(strategy)) for strategy in self._strategies}

    @cached_property
    def are_attended(self) -> bool:
        """Whether a strategy steps in at attention, be it a module or an operation, in the blocks."""
        attending = [strategy for strategy in self._strategies if "attention" in strategy.levels]
        return any(map(self._steps_in_at_attention, attending))

    @property
    def are_inside_blocks(self) -> bool:
        """Whether a strategy works at modules or operations inside blocks."""
        return self.are_attended or any("module" in strategy.levels for strategy in self._strategies)

    def parameters_at(self, strategy: Strategy, site: Site) -> int:
        """How many parameters the module at this site has; none where it is an operation."""
        here = (module for module, known in self.of[strategy] if known.level == site.level and known.name == site.name)
        return sum(parameter.numel() for module in here for parameter in module.parameters())

    def _sites_of(self, strategy: Strategy) -> Iterator[tuple[nn.Module, Site]]:
        for level in strategy.levels:
            if level in SITES_OF:
                yield from SITES_OF[level](self.blocks, strategy)

    def _steps_in_at_attention(self, strategy: Strategy) -> bool:
        operations = [Site("attention", name, kind=kind) for name in self.blocks for kind in get_args(AttentionKind)]
        return any(map(strategy.steps_in_at, [*(site for _, site in self.of[strategy]), *operations]))


class Models:
    """The models that a run calls. Branches in threads call one each, a clone of the others."""

    def __init__(self, strategies: Sequence[Strategy], methods: Mapping[str, str]) -> None:
        self._strategies, self._methods = strategies, methods
        self._known: dict[nn.Module, KnownModel] = {}
        self._locks: dict[nn.Module, threading.RLock] = {}  # one call of a model at a time: hooks are on its blocks
        self._lock = threading.Lock()

    def of(self, model: nn.Module) -> KnownModel:
        """What is known of this one."""
        with self._lock:
            if model not in self._known:
                in_use = self._locks.setdefault(uncompiled(model), threading.RLock())
                self._known[model] = KnownModel(model, self._strategies, self._methods, in_use)
            return self._known[model]

    def forget(self) -> None:
        """Let go of all models."""
        with self._lock:
            self._known.clear()
            self._locks.clear()


def _blocks(blocks: dict[str, nn.Module], strategy: Strategy) -> Sites:
    return [(block, Site("block", name)) for name, block in blocks.items()]


def _modules_inside(blocks: dict[str, nn.Module], strategy: Strategy) -> Sites:
    """The modules that the strategy chooses in each block."""
    chosen: dict[str, nn.Module] = {}
    for name, block in blocks.items():
        modules = {name: block} | _running_inside(name, block)
        inner = [path for path in modules if path != name]
        chosen |= {path: modules[path] for path in strategy.modules_in(name, inner)}
    return [(module, Site("module", name)) for name, module in _without_inner(chosen).items()]


def _attention_inside(blocks: dict[str, nn.Module], strategy: Strategy) -> Sites:
    """The attention modules in each block; those it does not step in at too, as what runs in them is no site."""
    inside = [item for name, block in blocks.items() for item in _running_inside(name, block).items()]
    modules = _without_inner({path: module for path, module in inside if is_attention(path)})
    return [(module, Site("attention", name, kind=kind_of(name, module))) for name, module in modules.items()]


SITES_OF = {"block": _blocks, "module": _modules_inside, "attention": _attention_inside}


def _running_inside(name: str, block: nn.Module) -> dict[str, nn.Module]:
    """The modules inside a block that have a forward, by dotted name."""
    return {
        own_name(path): module
        for path, module in uncompiled(block).named_modules(prefix=name)
        if path != name and not path.endswith(INSIDE) and type(uncompiled(module)).forward is not nn.Module.forward
    }


def _without_inner(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that are not inside another of them."""

    def is_inner(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:length]) in modules for length in range(1, len(parts)))

    return {name: module for name, module in modules.items() if not is_inner(name)}
