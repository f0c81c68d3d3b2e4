"""`CacheRun`: what adapters call, from the first evaluation of a sampling run to its end."""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..report.record import Stopwatch
from ..strategy import GUIDANCE, Schedule, Strategy
from .beginning import begun
from .budget import Budget
from .call import ModelCall
from .evaluation import BRANCHES_CHANGE, MOST_CHANGES
from .going_on import FEW_TIMES, begin_unasked, follow, go_on
from .guidance import Predict, at_guidance, mended
from .models import KnownModel, Models
from .path import LatentPath, Paths
from .ranks import Ranks
from .reading import SigmaReading
from .recording import record
from .repairing import CANNOT, repaired
from .state import CallState, RunState, Terms
from .telling import telling
from .visit import Visit


class CacheRun:
    """Carries strategies through one sampling run. Make a new one for each run; drop it afterwards.

    run = CacheRun([FirstBlockCache()], Schedule(sigmas))
    run.begin_evaluation()
    output = run.call_model(model, lambda: model(latent, sigma), sigma, contexts=["negative", "positive"])

    `methods` names, by the class of a module, the method by which a model runs it where that is not `forward`.
    `on_blocks_left_out` is called within a model call once it is decided that the blocks still to come won't run.
    `denoise_mask` is 1 where the sampler draws freely, less where the latent is held to another picture. `ranks` are
    the processes that call the model at the same time, each with a part of the tokens. `cancels` are the exceptions by
    which whoever drives the run ends it, and which therefore pass wherever other errors are taken care of. `free` tells
    how many bytes may be held on a device, `free_away` how many in main memory instead; None where nobody knows.
    Branches may be called in threads, each on a model of its own: see `Evaluation.in_threads`.
    """

    def __init__(
        self,
        strategies: Sequence[Strategy],
        schedule: Schedule,
        methods: Mapping[str, str] | None = None,
        on_blocks_left_out: Callable[[], None] | None = None,
        denoise_mask: Tensor | None = None,
        ranks: Ranks | None = None,
        cancels: tuple[type[BaseException], ...] = (),
        free: Callable[[torch.device], float | None] = lambda device: None,
        free_away: Callable[[torch.device], float | None] = lambda device: None,
    ) -> None:
        on, self.report = begun(strategies, schedule)
        terms = Terms(on, schedule, ranks or Ranks(), methods or {}, on_blocks_left_out, cancels)
        paths = Paths(LatentPath(denoise_mask), are_followed=bool(terms.trust_schedule))
        why = "; ".join(self.report.obstacles)
        budget = Budget(partial(terms.ranks.least, free), free_away)
        self.state = RunState(terms, Models(on, terms.methods), paths, self.report, budget=budget, why_computed=why)
        self.asked_together = False  # whether the adapter has asked for several branches in one request so far
        self._here = threading.local()  # .call: the model call that runs in this thread
        self._lock = threading.Lock()  # around the report

    def __deepcopy__(self, memo: Any) -> Any:
        """A run is one run, whoever copies what it travels in: other nodes copy ComfyUI's options in mid-run."""
        return self

    def telling(self) -> AbstractContextManager[None]:
        """Around what only tells of this run: an error in it does not end the run."""
        return telling(self.report, self.state.terms.cancels)

    def begin_evaluation(self, sigma: SigmaReading | None = None, latent: Tensor | None = None) -> None:
        """The sampler asks for the noise prediction once more; of all branches at this sigma, where that is known.

        With the latent, and with `end_evaluation`, it is seen whether the sampler adds noise. Where nobody calls this,
        an evaluation begins with each sigma, and when a branch comes again.
        """
        self.again(partial(self.state.begin_evaluation, sigma, latent))

    def begin_evaluation_of(self, latent: Tensor) -> None:
        """The same, where all that is known is what is asked about: a second look at one latent begins no other."""
        if self.state.asked_about() is latent:
            self.state.is_evaluating = True
        else:
            self.state.leave_unrepaired(CANNOT)  # what is given to the sampler is not seen
            self.begin_evaluation(latent=latent)

    def end_evaluation(self, *predictions: Tensor) -> Tensor | None:
        """The sampler is given this prediction of the clean latent, guidance and all, or those it is weighed from.
        Returns the first as it should be given: repaired, where the adapter allowed that (`allow_repair`).
        """
        predictions = repaired(self.state, predictions)
        self.again(partial(self.state.end_evaluation, predictions))
        return predictions[0] if predictions else None

    def pass_over(self, why: str) -> None:
        """A model call that is none of ours is made, for this reason."""
        self.state.was_called = True
        self.report.note(why)

    def call_model(
        self, model: nn.Module, forward: Callable[[], Any], sigma: Tensor, contexts: Sequence[Hashable],
        labels: Sequence[str] = (), inputs: Sequence[Any] | None = None, latent: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Run `forward`, which calls `model` once, with the strategies in place. Returns what `forward` returns.

        The level `output` is what `model` returns. If `forward` returns the denoised latent, say so by `inputs`, all
        that it depends on: then that is kept instead once the sampler was seen to add noise. What was kept from inputs
        of other shapes is not used.
        `contexts` says whose forward pass this is, one key for each branch joined along the batch axis; whatever makes
        old features unusable (another prompt, window, shape, model instance) belongs into the key. `labels` names the
        branches in the report. `latent`, (branches * pictures, ...), is what the model is asked about: if it is none
        that goes on from what these branches were asked about before, what they keep is dropped.
        """
        known, outer, names = self.state.models.of(model), self._call_here, tuple(labels) or tuple(map(str, contexts))
        self.state.was_called = True
        if not known.is_learned:
            self.state.budget.look(sigma.device)
        with known.lock:
            state = self.again(partial(self._new_call, known, sigma, contexts, names))
            try:
                with state.watch:
                    output, visits = self.again(partial(self._compute, state, forward, inputs, latent))
            finally:
                self._here.call = outer
                if state.evaluation.lead is not None:
                    state.evaluation.ended_call(model)
        with self._lock:
            record(state, visits, names)
        return output

    def call_attention(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one attention operation. For adapters that can step in there: some blocks have no attention modules."""
        call = self._call_here
        return forward(*args, **kwargs) if call is None else call.attention(forward, args, kwargs)

    def call_guidance(
        self, model: nn.Module, predict: Predict, sigma: Tensor, context: Hashable, label: str = "negative",
        latent: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The noise predictions of one evaluation with and without the prompt, by `predict(with, without)`.

        `predict` makes model calls for those predictions that are wanted, the other is None. `context` and `label` are
        those of the branch without the prompt; both predictions have the latent's shape.
        """
        return self.again(partial(self._guide, model, mended(self.state, predict), sigma, context, label, latent))

    def _guide(
        self, model: nn.Module, predict: Predict, sigma: Tensor, context: Hashable, label: str, latent: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        strategy, evaluation = self.state.terms.at_guidance, self.state.evaluation
        if strategy is None or self.state.why_all_prompts or self.state.others_seen >= FEW_TIMES:
            return predict(True, True)
        state = self._new_call(self.state.models.of(model), sigma, [("guidance", context)], (label,))
        follow(state, latent)
        visit, known, evaluation.sigma = Visit(state, strategy, GUIDANCE), evaluation.sigma, state.sigma
        try:
            predictions = at_guidance(visit, predict, latent)
        finally:
            evaluation.sigma, evaluation.unconditional = known, None
        with self._lock:
            record(state, [visit], (label,) if visit.was_answered else ())
        return predictions

    def forget(self, context: Hashable) -> None:
        """Drop what the branch with this key keeps: it won't come again."""
        self.state.memories.forget({key[0] for key in self.state.memories if key[0][0] == context})

    def free(self) -> None:
        """Drop everything kept. The report stays."""
        self.state.free()

    def _new_call(self, model: KnownModel, sigma: Tensor, contexts: Sequence[Hashable], names: Sequence) -> CallState:
        state = self.state
        with self._lock:
            if not state.is_evaluating:
                begin_unasked(state, sigma, contexts)
        evaluation, reading = state.evaluation, state.evaluation.sigma
        if reading is None or reading.tensor.device != sigma.device:
            reading = SigmaReading(sigma, state.terms.schedule, state.paths)
        own = evaluation.own_contexts(contexts, model.module)
        if evaluation.changes == MOST_CHANGES:
            self.report.note(BRANCHES_CHANGE)
        return CallState(state, model, reading, own, evaluation, Stopwatch(reading.tensor.device), names)

    def _compute(
        self, state: CallState, forward: Callable[[], Any], inputs: Sequence[Any] | None, latent: Tensor | None
    ) -> tuple[Any, list[Visit]]:
        paths = follow(state, latent) if latent is not None else []
        self._here.call = call = ModelCall(state, forward, inputs)
        output = call.compute()
        if paths:
            go_on(self.state, paths, output)
        return output, call.visits

    def again(self, attempt: Callable[[], Any]) -> Any:
        """What `attempt` gives; once more, with less on and nothing kept, where memory runs out."""
        while True:
            try:
                return attempt()
            except Exception as error:
                if not self.state.terms.go_on_after(error):
                    raise
            self._here.call = None  # nothing refers to what failed by now
            self.state.memory_ran_out()

    @property
    def _call_here(self) -> ModelCall | None:  # in this thread
        return getattr(self._here, "call", None)
