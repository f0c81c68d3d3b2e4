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
from ..strategy.packed import Packed, away, bytes_packed, packed
from .cost import cost_of_reuse
from .memory import BlocksRan
from .state import CallState
from .worth import work_of


class BranchCall:
    """See `strategy.Call`."""

    def __init__(self, call: CallState, strategy: Strategy, site: Site, may_reuse: bool) -> None:
        self.strategy, self.site, self.may_reuse = strategy, site, may_reuse
        self._call, self.schedule = call, call.run.terms.schedule
        self.total = partial(call.run.terms.ranks.total, branches=call.contexts)
        self.note, self.reason, self.order = call.run.report.note, "nothing to reuse yet", 0
        self.measure: float | None = None
        self.threshold: float | None = None
        self.cost_of_reuse = cost_of_reuse(call, strategy, site) if strategy.target_speedup else None

    @cached_property
    def step(self) -> Step:
        if self.strategy in self._call.run.terms.trust_schedule:
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
        self._is_separable, self._tested = parts is not None, parts
        if parts is not None and not self._may_reuse and self.strategy.tests_first_block:
            self._abstain(parts[0][0])
        return COMPUTE if parts is None else self._ask(parts)

    def split(self, tensors: Sequence[Tensor]) -> list[Features] | None:
        """Each branch's share of these; None where the branches can't be told apart."""
        count = len(self.contexts)
        if count == 1:
            return [tuple(tensors)]
        return list(zip(*(tensor.chunk(count) for tensor in tensors))) if self._have_rows(tensors) else None

    def wants(self, parts: list[Features] | None) -> bool:
        """Whether the branches keep anything of a site that was computed: these are their shares. They must fit."""
        if parts is None or not self._is_separable:
            return False
        run, site = self.call.run, (self.strategy, self.site)
        tested = self._tested or [()] * len(parts)
        wanted = [self.strategy.will_hold(self.site, part, first) for part, first in zip(parts, tested)]
        one = partial(bytes_packed, parts[0], self.strategy.stored_as(self.site))
        work, device = partial(self._work_of, parts[0]), self.call.sigma.tensor.device
        if not run.budget.reserve(run.memories, site, self.memories, wanted, device, work, one):
            return False
        for memory in self.memories:
            memory.layout = self._layout
        return self._request is COMPUTE

    def keep(self, parts: list[Features], structure: Structure | None = None, ran: BlocksRan | None = None) -> None:
        """Each branch keeps what the strategy wants of its share, which is given away. Ask first whether it `wants`."""
        dtype, is_away = self.strategy.stored_as(self.site), self._is_away
        if is_away or dtype is not None:
            parts = [tuple(self._stored(tensor, dtype, is_away) for tensor in part) for part in parts]
        self._ask(parts)
        if self._asking:
            raise RuntimeError(
                f"{self.strategy.title}: around() asked again after the whole site was computed. Write `yield COMPUTE` "
                f"once, last."
            )
        for memory in self.memories:
            memory.structure, memory.ran = structure, ran
        self.has_kept = True

    def copies(self, parts: list[Features]) -> list[Features]:
        """Of each branch its own, in the form in which the strategy keeps it: what one branch drops is free."""
        dtype = self.strategy.stored_as(self.site)
        return [tuple(packed(tensor, dtype, copy=True) for tensor in part) for part in parts]

    def own(self, answer: Features) -> Features:
        """What stands in, as tensors that nobody holds: the model may write into them."""
        held = self.memories[0].holds
        return tuple(tensor.clone() if held(tensor) else tensor for tensor in answer)

    @property
    def is_kept(self) -> bool:
        """Whether the strategy wants to keep what is computed."""
        return self._request is not COMPUTE_ONLY

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
        if len(requests) > 1 or (computed and requests - {COMPUTE, COMPUTE_ONLY}):
            raise RuntimeError(
                f"{self.strategy.title}: around() must ask for the same in all branches: for a part at most once, "
                f"first, then for the whole. Decide by call.measured(...), which is one number for all branches."
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

    def _stored(self, tensor: Tensor, dtype: torch.dtype | None, is_away: bool) -> Tensor:
        """As the strategy keeps it, and where. The tensor is given away."""
        kept = packed(tensor, dtype)
        if not is_away:
            return kept
        device = (kept.parts[0] if isinstance(kept, Packed) else kept).device
        return away(kept, self.call.run.budget.lane(device))

    @property
    def _is_away(self) -> bool:
        away = self.call.run.budget.away
        return bool(away) and (self.strategy, self.site) in away

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
