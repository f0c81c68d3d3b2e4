"""One strategy at one site in one model call, for all branches that are joined in it.

The branches of a prompt are rows of one batch, (branches * pictures, ...). Only this file knows that: what drives a
site hands over whole batches, and a strategy sees one branch's share.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from ..model import Structure
from ..strategy import COMPUTE, COMPUTE_ONLY, Features, Request, Site, Step, Strategy, relative_sums, same_layout
from ..strategy.packed import Packed, bytes_packed
from .cost import cost_of_reuse
from .memory import BlocksRan
from .state import CallState
from .worth import work_of


class BranchCall:
    """See `strategy.Call`. `labels` are the branch's, or those of several that can't be told apart."""

    def __init__(self, call: CallState, strategy: Strategy, site: Site, may_reuse: bool, labels: Sequence[str]) -> None:
        self.strategy, self.site, self.may_reuse = strategy, site, may_reuse
        self._call, self._labels, self.schedule = call, labels, call.run.terms.schedule
        self.total = partial(call.run.terms.ranks.total, branches=call.contexts)
        self.note, self.reason, self.order = call.run.report.note, "nothing to reuse yet", 0
        self.measure = self.threshold = self.serves_until = None
        self.cost_of_reuse = cost_of_reuse(call, strategy, site) if strategy.target_speedup else None

    @cached_property
    def step(self) -> Step:
        if self.strategy in self._call.run.terms.trust_schedule:
            self._call.run.sampler_adds_noise(self._call.sigma)
        return self._call.sigma.step

    @property
    def adds_noise(self) -> bool:
        return self._call.run.sampler_adds_noise(self._call.sigma)

    @property
    def may_be_left_out(self) -> bool:
        return not self._call.run.why_all_prompts and self._call.evaluation.unconditional in self._labels

    @property
    def is_of_no_use(self) -> bool:
        """Whether neither this step nor one that follows may reuse what this branch gives here."""
        return self.serves_until is not None and self.serves_until < self.step.index

    def measured(self, measure: Callable[[Tensor], Tensor]) -> float:
        take = partial(self._call.sigma.measured, measure)
        return self._call.evaluation.measured(self.strategy, self.site, self._call.model.module, take)


class Visit:
    """A strategy's way from a site to what its branches remember, and to the report."""

    def __init__(self, call: CallState, strategy: Strategy, site: Site) -> None:
        self.call, self.strategy, self.site = call, strategy, site
        self.branches: list[BranchCall] = []  # the site as each branch sees it, once the strategy is asked
        self.was_answered = self.has_kept = False
        self.operations = 0  # that were counted while the site was computed: in the first call, where something counts
        self.units = call.model.plan.block_count if site.level == "model" else 1
        self.units_computed = self.units if self.is_excluded else 0
        self.contexts, self._is_separable = call.contexts, True
        self._tested: list[Features] | None = None  # what the branches were given of the first block
        self._request: Request | None = None  # the last

    def decide(self, given: Sequence[Tensor], in_rows: Sequence[Tensor] = ()) -> Request | Features:
        """What the strategy wants computed first, or what stands in for the site, of all branches.

        `given` is what the site is given: what was kept from other shapes can't be used. `in_rows` are those tensors
        that must hold the rows of all branches; where they can't, the branches are taken as one.
        """
        if not self._have_rows(in_rows):
            self.contexts = (self.contexts,)
        run, evaluation, count = self.call.run, self.call.evaluation, len(self.contexts)
        rows = in_rows[0].shape[0] if in_rows and count > 1 else 0
        self._layout = tuple(  # of one branch's share; what is for all, such as positions, is one and the same
            (tensor.shape[0] // count, *tensor.shape[1:]) if rows and tensor.shape[0] == rows else tuple(tensor.shape)
            for tensor in given
        )
        self.memories = [run.memories.of(context, self.strategy, self.site) for context in self.contexts]
        if any(memory.layout != self._layout for memory in self.memories):
            evaluation.must_compute.add(self.strategy)
        self._may_reuse = self.strategy not in evaluation.must_compute and not evaluation.all_compute
        self.branches = [BranchCall(self.call, self.strategy, self.site, self._may_reuse, own) for own in self._labels]
        pairs = zip(self.branches, self.memories)
        self._asking = {n: self.strategy.around(branch, memory.state) for n, (branch, memory) in enumerate(pairs)}
        self._answers: list[Features | None] = [None] * count
        return self._ask()

    def decide_with(self, computed: Sequence[Tensor]) -> Request | Features:
        """The same, once there is the part that the strategy wanted first. These tensors are given away."""
        parts = self.split(computed)
        self._is_separable, self._tested = parts is not None, parts
        if parts is not None and not self._may_reuse and self.strategy.tests_first_block:
            self._abstain(parts[0][0])
        return COMPUTE if parts is None else self._ask(parts)

    def split(self, tensors: Sequence[Tensor]) -> list[Features] | None:
        """Each branch's share of these; None where the branches can't be told apart."""
        if (count := len(self.contexts)) == 1:
            return [tuple(tensors)]
        return list(zip(*(tensor.chunk(count) for tensor in tensors))) if self._have_rows(tensors) else None

    def wants(self, parts: list[Features] | None) -> bool:
        """Whether branches keep anything of a site that was computed: these are their shares. They must fit."""
        if parts is None or not self._is_separable:
            return False
        run, site = self.call.run, (self.strategy, self.site)
        tested = self._tested or [()] * len(parts)
        wanted = [self.strategy.will_hold(self.site, part, first) for part, first in zip(parts, tested)]
        wanted = [0 if branch.is_of_no_use else count for branch, count in zip(self.branches, wanted)]
        one = partial(bytes_packed, parts[0], self.strategy.stored_as(self.site))
        work, device = partial(self._work_of, parts[0]), self.call.sigma.tensor.device
        if not run.budget.reserve(run.memories, site, self.memories, wanted, device, work, one):
            return False
        for memory, branch in zip(self.memories, self.branches):
            memory.layout, memory.serves_until = self._layout, branch.serves_until
        return self._request is COMPUTE

    def keep(self, parts: list[Features], structure: Structure | None = None, ran: BlocksRan | None = None) -> None:
        """Branches keep what the strategy wants of their shares, given away. Ask first whether any `wants` it."""
        dtype, is_away = self.strategy.stored_as(self.site), self._is_away
        if is_away or dtype is not None:
            stored = partial(self.call.run.budget.stored, dtype=dtype, is_away=is_away)
            parts = [tuple(map(stored, part)) for part in parts]
        self._ask(parts)
        if self._asking:
            raise RuntimeError(
                f"{self.strategy.title}: around() asked again after the whole site was computed. Write `yield COMPUTE` "
                f"once, last."
            )
        for memory in self.memories:
            memory.structure, memory.ran = structure, ran
        self.has_kept = True

    def keeps(self, number: int) -> bool:
        """Whether the branch with this number wants its share of what is computed."""
        return number in self._asking

    @property
    def is_kept(self) -> bool:
        """Whether the strategy wants to keep what is computed."""
        return self._request is not COMPUTE_ONLY

    @property
    def is_excluded(self) -> bool:
        """Whether the strategy is kept out here."""
        return (self.strategy, self.site) in self.call.run.memories.excluded

    def note(self, text: str) -> None:
        """Say something in the report, once."""
        self.call.run.report.note(text)

    def _ask(self, computed: list[Features] | None = None) -> Request | Features:
        """What all branches want next or, if each gave an answer and none is new here, the answers as one batch."""
        given: dict[int, Request] = {}
        for branch, around in list(self._asking.items()):
            try:
                given[branch] = around.send(computed[branch] if computed else None)
            except StopIteration as stop:
                self._answers[branch] = stop.value
                del self._asking[branch]
        requests = {*given.values()}
        if requests == {COMPUTE, COMPUTE_ONLY}:  # some keep their shares
            requests = {COMPUTE}
            self._asking = {branch: self._asking[branch] for branch in given if given[branch] is COMPUTE}
        if len(requests) > 1 or (computed and requests - {COMPUTE, COMPUTE_ONLY}):
            raise RuntimeError(
                f"{self.strategy.title}: around() must ask for the same part in all branches, at most once and first, "
                f"then for the whole. Decide by call.measured(...), which is one number for all branches."
            )
        answers = self._answers
        if requests or not self._may_reuse or any(answer is None for answer in answers):
            self._request = requests.pop() if requests else COMPUTE
            return self._request
        if len(answers) > 1 and not all(same_layout(answer, answers[0]) for answer in answers):
            return COMPUTE
        self.was_answered = True
        if self.site.level == "model" and self.call.run.terms.on_blocks_left_out is not None:
            self.call.run.terms.on_blocks_left_out()
        self._answers = []  # the visit stays until the call is over; what it answered is the model's
        answers = [tuple(each.restored() if isinstance(each, Packed) else each for each in one) for one in answers]
        if self._is_away:
            self.call.run.budget.fetch_after(self.call.run.memories, (self.strategy, self.site), self.contexts)
        return answers[0] if len(answers) == 1 else tuple(map(torch.cat, zip(*answers)))

    @property
    def _labels(self) -> list[tuple[str, ...]]:
        """The names of each branch; of all, where they are taken as one."""
        labels, count = self.call.labels, len(self.contexts)
        return [(label,) for label in labels] if len(labels) == count else [labels if count == 1 else ()] * count

    @property
    def _is_away(self) -> bool:
        return bool(away := self.call.run.budget.away) and (self.strategy, self.site) in away

    def _work_of(self, part: Features) -> float:
        """How many floating-point operations the site takes for one branch, as counted or else by shapes."""
        if self.operations:
            return self.operations / len(self.contexts)
        return work_of(part, self.site.kind, self.call.model.sites.parameters_at(self.strategy, self.site))

    def _abstain(self, part: Tensor) -> None:
        """Other ranks may measure now, and wait for this one: as it can reuse nothing, what they get is NaN."""
        ranks = self.call.run.terms.ranks
        if ranks.group is not None:
            self.branches[0].measured(lambda _: ranks.abstained(relative_sums(part, part)).max())

    def _have_rows(self, tensors: Sequence[Tensor]) -> bool:
        return all(tensor.ndim and tensor.shape[0] % len(self.contexts) == 0 for tensor in tensors)
