"""One strategy at one site in one model call, for all branches that are joined in it.

The branches of a prompt are rows of one batch, (branches * pictures, ...). Only this file knows that: what drives a
site hands over whole batches, and a strategy sees one branch's share.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from ..model import Structure
from ..strategy import COMPUTE, Features, Request, Site, Step, Strategy, same_layout
from .memory import BlocksRan
from .state import CallState


class BranchCall:
    """See `strategy.Call`."""

    def __init__(self, call: CallState, strategy: Strategy, site: Site, may_reuse: bool) -> None:
        self.strategy, self.site, self.may_reuse = strategy, site, may_reuse
        self.schedule, self.total = call.run.terms.schedule, call.run.terms.ranks.total
        self.note, self.reason, self.order = call.run.report.note, "nothing to reuse yet", 0
        self.measure: float | None = None
        self.threshold: float | None = None
        self._call = call

    @cached_property
    def step(self) -> Step:
        if self.strategy.trusts_schedule:
            self._call.run.sampler_adds_noise(self._call.sigma)
        return self._call.sigma.step

    @property
    def adds_noise(self) -> bool:
        return self._call.run.sampler_adds_noise(self._call.sigma)

    def measured(self, measure: Callable[[Tensor], Tensor]) -> float:
        take = partial(self._call.sigma.measured, measure)
        return self._call.evaluation.measured(self.strategy, self.site, self._call.model.module, take)


class Visit:
    """A strategy's way from a site to what its branches remember, and to the report."""

    def __init__(self, call: CallState, strategy: Strategy, site: Site) -> None:
        self.call, self.strategy, self.site = call, strategy, site
        self.branches: list[BranchCall] = []  # the site as each branch sees it, once the strategy is asked
        self.was_answered = self.has_kept = False
        self.units = call.model.plan.block_count if site.level == "model" else 1
        self.units_computed = self.units if self.is_excluded else 0
        self.contexts, self._is_separable = call.contexts, True

    def decide(self, given: Sequence[Tensor], in_rows: Sequence[Tensor] = ()) -> Request | Features:
        """What the strategy wants computed first, or what stands in for the site, of all branches.

        `given` is what the site is given: what was kept from other shapes can't be used. `in_rows` are those tensors
        that must hold the rows of all branches; where they can't, the branches are taken as one.
        """
        if not self._have_rows(in_rows):
            self.contexts = (self.contexts,)
        run, evaluation, count = self.call.run, self.call.evaluation, len(self.contexts)
        self._layout = tuple(  # of one branch's share; whole shapes where the first axis does not divide
            (tensor.shape[0] // count, *tensor.shape[1:]) if self._have_rows([tensor]) else (count, *tensor.shape)
            for tensor in given
        )
        self.memories = [run.memories.of(context, self.strategy, self.site) for context in self.contexts]
        if any(memory.layout != self._layout for memory in self.memories):
            evaluation.must_compute.add(self.strategy)
        self._may_reuse = self.strategy not in evaluation.must_compute and not evaluation.all_compute
        self.branches = [BranchCall(self.call, self.strategy, self.site, self._may_reuse) for _ in self.memories]
        pairs = zip(self.branches, self.memories)
        self._asking = {n: self.strategy.around(branch, memory.state) for n, (branch, memory) in enumerate(pairs)}
        self._answers: list[Features | None] = [None] * count
        return self._ask()

    def decide_with(self, computed: Sequence[Tensor]) -> Request | Features:
        """The same, once there is the part that the strategy wanted first. These tensors are given away."""
        parts = self.split(computed)
        self._is_separable = parts is not None
        return COMPUTE if parts is None else self._ask(parts)

    def split(self, tensors: Sequence[Tensor]) -> list[Features] | None:
        """Each branch's share of these; None where the branches can't be told apart."""
        count = len(self.contexts)
        if count == 1:
            return [tuple(tensors)]
        return list(zip(*(tensor.chunk(count) for tensor in tensors))) if self._have_rows(tensors) else None

    def keep(
        self, parts: list[Features] | None, structure: Structure | None = None, ran: BlocksRan | None = None
    ) -> None:
        """The site was computed: each branch keeps what the strategy wants of its share."""
        if parts is None or not self._is_separable:
            return
        self._ask(parts)
        if self._asking:
            raise RuntimeError(
                f"{self.strategy.title}: around() asked again after the whole site was computed. Write `yield COMPUTE` "
                f"once, last."
            )
        for memory in self.memories:
            memory.layout, memory.structure, memory.ran = self._layout, structure, ran
        self.has_kept = True

    @property
    def is_excluded(self) -> bool:
        """Whether the strategy is kept out here."""
        return (self.strategy, self.site) in self.call.run.memories.excluded

    def exclude(self) -> None:
        """What this site gives can't be kept: keep the strategy out from now on, so that it may reuse elsewhere."""
        self.call.run.memories.excluded.add((self.strategy, self.site))
        self.note(f"{self.site.name or 'the model'} always runs: it returns something that can't be kept")

    def note(self, text: str) -> None:
        """Say something in the report, once."""
        self.call.run.report.note(text)

    def _ask(self, computed: list[Features] | None = None) -> Request | Features:
        """What all branches want next or, if each gave an answer and none is new here, the answers as one batch."""
        requests = set()
        for branch, around in list(self._asking.items()):
            try:
                requests.add(around.send(computed[branch] if computed else None))
            except StopIteration as stop:
                self._answers[branch] = stop.value
                del self._asking[branch]
        if len(requests) > 1 or (computed and requests - {COMPUTE}):
            raise RuntimeError(
                f"{self.strategy.title}: around() must ask for the same in all branches: for a part at most once, "
                f"first, then for the whole. Decide by call.measured(...), which is one number for all branches."
            )
        answers = self._answers
        if requests or not self._may_reuse or any(answer is None for answer in answers):
            return requests.pop() if requests else COMPUTE
        if len(answers) > 1 and not all(same_layout(answer, answers[0]) for answer in answers):
            return COMPUTE
        self.was_answered = True
        if self.site.level == "model" and self.call.run.terms.on_blocks_left_out is not None:
            self.call.run.terms.on_blocks_left_out()
        return tuple(answers[0]) if len(answers) == 1 else tuple(map(torch.cat, zip(*answers)))

    def _have_rows(self, tensors: Sequence[Tensor]) -> bool:
        return all(tensor.ndim and tensor.shape[0] % len(self.contexts) == 0 for tensor in tensors)
