"""One model call on its way through the strategies."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..model import Around, Forward, Hook, HookRegistry, Lesson, collecting, kind_of_operation, method_of, tensors_in
from ..strategy import Site, Strategy
from .learning import learn, lesson_for
from .models import SITES_OF
from .sites import at_module
from .stack import BlockStack
from .state import CallState
from .visit import Visit

UNCOMPILED = "blocks run without torch.compile: this cache steps in inside them; one at level model or output keeps it"
NOT_AS_LEARNED = "the model did not run its blocks as learned; such calls are computed again"
NO_SITES = "no chain of blocks was found in this model, so level {} has nothing to cache"
OUTPUT, STACK = Site("output", ""), Site("model", "")


class ModelCall:
    """Hooks on the model for the length of one forward pass, by which strategies step in where they belong.

    `forward` calls the model once; `inputs` as in `CacheRun.call_model`.
    """

    def __init__(self, state: CallState, forward: Callable[[], Any], inputs: Sequence[Any] | None) -> None:
        self.state, self.run, self.model = state, state.run, state.model
        self.forward, self.inputs, self.splits = forward, inputs, state.run.terms.ranks.splits
        self.visits: list[Visit] = []
        self._turns: dict[tuple[Strategy, str], int] = {}
        self._running: list[tuple[str, Any]] = []  # the blocks that run now, and what each was given, outermost first
        self._is_inside_attention = False
        self._is_counting = False  # what sites cost
        leaves_out = self.run.terms.stand_in_for_calls or self.run.terms.at_guidance is not None  # calls, or prompts
        self._is_watched = leaves_out and self.model.compilation.is_none

    def compute(self) -> Any:
        """What `forward` returns, or would have returned."""
        lesson = None if self.model.is_learned else lesson_for(self.state)
        stacks, ran = self._stacks(), set()
        around_model, forward = self._at_output(stacks, lesson)
        hooks = self._counting() if lesson else []  # of two on one module, the later strategy's runs first
        hooks += self._watching(ran)
        for strategy in self.run.terms.strategies:
            hooks += self.model.plan.along(stacks[strategy].block) if strategy in stacks else ()
            hooks += [hook for owner, hook in around_model if owner is strategy]
            hooks += self._at_sites(strategy)
        hooks += self._naming_blocks()
        hooks += lesson.watching() if lesson else ()
        with HookRegistry(self._between_compiled([*hooks, *self.splits])):
            output = forward()
        if lesson is not None:
            learn(self.state, lesson, self._perform, partial(self._visit, site=STACK))
        is_misled = False
        for stack in stacks.values():
            is_misled |= not stack.end() and stack.answers is not None
        if is_misled:
            output = self._computed_again(ran)
        stood_in = any(visit.was_answered and visit.site.level != "attention" for visit in self.visits)
        if self._is_watched and not stood_in and self.model.work.is_little(ran, self.state.contexts):
            self.run.someone_else_answered()
        return output

    def attention(self, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """One attention operation. It is a site where no attention module is around it."""
        if self._is_counting and len(args) > 1:
            forward = partial(self.model.counter.operation, forward)
        if not self._running or self._is_inside_attention:
            return forward(*args, **kwargs)
        (block, given), (query, key) = self._running[-1], args[:2]
        site = Site("attention", block, kind=kind_of_operation(block, query, key, tensors_in(given).values()))
        for strategy in self.run.terms.strategies:
            if "attention" in strategy.levels and strategy.steps_in_at(site):
                forward = partial(self._at(strategy, site), forward)
        return forward(*args, **kwargs)

    # The hooks, source by source

    def _stacks(self) -> dict[Strategy, BlockStack]:
        """The way along the chains of blocks, for each strategy that works there."""
        plan, stacks, excluded = self.model.plan, {}, self.run.memories.excluded
        for strategy in self.run.terms.strategies:
            if "model" in strategy.levels and plan.chains and (strategy, STACK) not in excluded:
                stacks[strategy] = BlockStack(self._visit(strategy, STACK), plan)
        return stacks

    def _at_output(
        self, stacks: dict[Strategy, BlockStack], lesson: Lesson | None
    ) -> tuple[list[tuple[Strategy, Hook]], Callable[[], Any]]:
        """Hooks on the model for strategies that keep its output, and `forward`.

        Once the sampler was seen to add noise they are around `forward` instead and keep the denoised latent: what the
        model returns belongs to the noise of one step. Level model works at the output where there is no chain.
        """
        levels = {"output"} if lesson or self.model.plan.chains else {"output", "model"}
        strategies = [each for each in self.run.terms.strategies if each not in stacks and levels & {*each.levels}]
        if not strategies or not self._keeps_denoised():
            return [(each, Hook(self.model.module, self._at(each, OUTPUT))) for each in strategies], self.forward
        forward: Callable[..., Any] = lambda *_: self.forward()  # noqa: E731 - a site is what gets inputs
        for strategy in strategies:
            forward = partial(self._at(strategy, OUTPUT), forward)
        return [], partial(forward, *self.inputs)

    def _keeps_denoised(self) -> bool:
        return self.inputs is not None and self.run.sampler_adds_noise(self.state.sigma)

    def _at_sites(self, strategy: Strategy) -> list[Hook]:
        """At blocks, and at modules inside them."""
        sites = self.model.sites
        for level in strategy.levels:
            if level in SITES_OF and not sites.blocks:
                self.run.report.note(NO_SITES.format(level))
        return [
            Hook(module, self._at(strategy, site), method_of(module, self.run.terms.methods))
            for module, site in sites.of[strategy]
            if site.level != "attention" or sites.are_attended
        ]

    def _naming_blocks(self) -> list[Hook]:
        """So that an attention operation is known by the block it runs in."""
        sites = self.model.sites
        blocks = sites.blocks.items() if sites.are_attended else ()
        methods = self.run.terms.methods
        return [Hook(block, partial(self._around_block, name), method_of(block, methods)) for name, block in blocks]

    def _counting(self) -> list[Hook]:
        """Hooks that count, in the call that teaches, the work at sites that may not all fit; for a wish all work.

        Not where something is compiled: they would be compiled with it.
        """
        terms, counter, sites = self.run.terms, self.model.counter, self.model.sites
        wish = any(strategy.target_speedup for strategy in terms.strategies)
        self._is_counting = (wish or any(map(terms.steps_in_at, SITES_OF))) and self.model.compilation.is_none
        if not self._is_counting:
            return []
        if not wish:
            return counter.watching(sites.blocks, terms.methods)
        whole = {"": self.model.module}
        parts = {site.name: module for each in sites.of.values() for module, site in each}
        noting = counter.noting({**whole, **sites.blocks, **parts}, terms.methods)
        return [*counter.watching(whole, terms.methods), *noting]

    def _watching(self, ran: set[nn.Module]) -> list[Hook]:
        """Hooks that collect what runs, to see whether someone else answers the call."""
        watched = self.model.work.watched if self._is_watched else {}
        return [Hook(module, partial(collecting, ran, module), method) for module, method in watched.items()]

    def _between_compiled(self, hooks: list[Hook]) -> list[Hook]:
        """These, and before them those that keep torch.compile's work around and behind them, never through them."""
        compilation, sites = self.model.compilation, self.model.sites
        if compilation.is_none:
            return hooks
        hooked = {hook.module: hook.method for hook in hooks if hook.module is not self.model.module}
        opened = compilation.opened_at(hooked)
        if not sites.are_inside_blocks:
            blocks = [block for block in sites.blocks.values() if block in hooked]
            opened += compilation.compiled_alone({block: hooked[block] for block in blocks})
        elif hooked:
            self.run.report.note(UNCOMPILED)
        return [*opened, *hooks]

    def _at(self, strategy: Strategy, site: Site) -> Around:
        return partial(self._around_site, strategy, site)

    def _around_site(self, strategy: Strategy, site: Site, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        outer = self._is_inside_attention
        self._is_inside_attention |= site.level == "attention"
        try:
            if not strategy.steps_in_at(site):
                return forward(*args, **kwargs)
            return at_module(self._visit(strategy, site), forward, args, kwargs)
        finally:
            self._is_inside_attention = outer

    def _around_block(self, name: str, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
        self._running.append((name, (args, kwargs)))
        try:
            return forward(*args, **kwargs)
        finally:
            self._running.pop()

    # What they need

    def _visit(self, strategy: Strategy, site: Site) -> Visit:
        """This strategy at this site, for the first time in this call or once more."""
        turn = self._turns.get((strategy, site.name), 0)
        self._turns[strategy, site.name] = turn + 1
        self.visits.append(visit := Visit(self.state, strategy, replace(site, turn=turn)))
        return visit

    def _perform(self, hooks: list[Hook]) -> None:
        """The same call once more, with these hooks instead."""
        with HookRegistry(self._between_compiled([*hooks, *self.splits])):
            self.forward()

    def _computed_again(self, ran: set[nn.Module]) -> Any:
        self.run.memories.forget(self.state.contexts)
        self.visits = []
        self.run.report.note(NOT_AS_LEARNED)
        ran.clear()
        with HookRegistry(self._between_compiled([*self._watching(ran), *self.splits])):
            return self.forward()
