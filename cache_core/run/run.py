"""One sampling run: what each branch of the prompt remembers, and what is known of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

from torch import Tensor, nn

from ..model.attention import is_attention, kind_of
from ..model.chains import BlockPlan, block_lists
from ..model.compiled import INSIDE, Compilation, own_name, uncompiled
from ..report.report import Report
from ..strategy.step import Schedule
from ..strategy.strategy import AttentionKind, Level, Site, Strategy
from .call import ModelCall
from .evaluation import NO_LEADER, Evaluation
from .memory import Memory, bytes_held
from .noise import LEAST_NOISE, LatentPath
from .ranks import Ranks
from .reading import SigmaReading

MOST_LESSONS = 4  # two branches of a prompt, twice
MOST_CHANGES = 4  # in a row: a prompt with a range that ends begins and ends another within two
BRANCHES_CHANGE = (
    "the branches of the prompt are others at every evaluation (context windows that move, LoRA keyframes), and new "
    "ones have nothing to reuse: choose static windows, or fewer keyframes"
)


class CacheRun:
    """Carries strategies through one sampling run. Make a new one for each run; drop it afterwards.

    run = CacheRun([FirstBlockCache()], Schedule(sigmas))
    run.begin_evaluation()
    output = run.call_model(model, lambda: model(latent, sigma), sigma, contexts=["negative", "positive"])

    `methods` names, by the class of a block, the method by which a model runs it where that is not `forward`.
    `on_blocks_left_out` is called within a model call once it is decided that the blocks still to come won't run.
    `denoise_mask` is 1 where the latent is all the sampler's, less where it is held to another picture. `ranks` are the
    processes that call the model at the same time, each with a part of the tokens.

    Branches may be called in threads, each on a model of its own: see `in_threads`.
    """

    def __init__(
        self,
        strategies: Sequence[Strategy],
        schedule: Schedule,
        methods: Mapping[str, str] | None = None,
        on_blocks_left_out: Callable[[], None] = lambda: None,
        denoise_mask: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.strategies = tuple(strategy for strategy in strategies if not strategy.is_off)
        self.schedule, self.methods, self.on_blocks_left_out = schedule, methods or {}, on_blocks_left_out
        self.ranks = ranks or Ranks()
        obstacles = () if schedule.is_open else (strategy.obstacle(schedule) for strategy in self.strategies)
        self.report = Report(tuple(strategies), schedule.count, obstacles=tuple(filter(None, obstacles)))
        self.evaluation, self.previous = Evaluation(), Evaluation()
        self.memories: dict[tuple[Hashable, int, Site], Memory] = {}
        self._here = threading.local()  # .call: the model call that runs in this thread
        self._lock = threading.RLock()  # around what the branches' threads share; never while a model runs
        self._in_use: dict[nn.Module, threading.RLock] = {}  # one call of a model at a time: hooks are on its blocks
        self._path = LatentPath(denoise_mask)
        self.adds_noise = False  # whether the sampler was seen to, between its steps
        self._plans: dict[nn.Module, BlockPlan] = {}
        self._compilations: dict[nn.Module, Compilation] = {}
        self._misses_leader = False  # of branches in threads
        self.barred: set[tuple[int, Site]] = set()  # sites where a strategy can't keep what it needs
        self._lessons: dict[nn.Module, int] = {}  # how many taught nothing
        self._places: dict[tuple[int, nn.Module], list[tuple[nn.Module, Site]]] = {}
        self._attends: dict[nn.Module, bool] = {}

    def begin_evaluation(self, sigma: SigmaReading | None = None, latent: Tensor | None = None) -> None:
        """The sampler asks for the noise prediction once more; of all branches at this sigma, where that is known.

        With the latent, and with `end_evaluation`, it is seen whether the sampler adds noise between its steps.
        """
        if self.evaluation.seen:  # another node may have answered without a model call: no branch was away then
            self.previous = self.evaluation
        self._forget_branches_gone()
        self.evaluation = Evaluation(self.evaluation.number + 1, sigma=sigma)
        if latent is not None and self.strategies and not self.adds_noise:
            self.evaluation.noise_share = self._path.noise_share(latent)

    def end_evaluation(self, latent: Tensor, prediction: Tensor) -> None:
        """The sampler is given this prediction of the clean latent, guidance and all, for this latent."""
        if self.strategies and not self.adds_noise:
            self._path.goes_on(latent, prediction)

    def noticed(self, noise_share: float) -> None:
        """So much of the latent's last move is no deterministic sampler's."""
        with self._lock:
            if noise_share > LEAST_NOISE and not self.adds_noise:
                self.adds_noise, self._path = True, LatentPath()
                for key in [key for key in self.memories if key[2].level == "output"]:
                    del self.memories[key]  # from now on something else is kept there

    @contextmanager
    def in_threads(self, branches: Collection[Hashable]) -> Iterator[None]:
        """While model calls of this evaluation run in threads, each on a model of its own.

        `branches` are all that will be called: with one that was not in the evaluation before, all compute, whichever
        thread is first. Before the threads begin, tell the evaluation which model leads: `begin_threads`.
        """
        evaluation = self.evaluation
        evaluation.announced.update(branches)
        evaluation.all_compute |= self._misses_leader or not evaluation.announced <= self.previous.announced
        try:
            yield
        finally:
            evaluation.end_threads()
            if evaluation.missed_leader:
                self._misses_leader = True
                self.report.note(NO_LEADER)

    def steps_in_at(self, level: Level) -> bool:
        """Whether one of the strategies works at this level."""
        if level == "guidance":
            return self.number_at_guidance is not None
        return any(level in strategy.levels for strategy in self.strategies)

    def attends_in(self, model: nn.Module) -> bool:
        """Whether a strategy steps in at attention, be it a module or an operation, in the model's blocks."""
        if model not in self._attends:
            attending = {n: strategy for n, strategy in enumerate(self.strategies) if "attention" in strategy.levels}
            sites = [(strategy, site) for n, strategy in attending.items() for _, site in self.places(n, model)]
            for name in self.blocks_of(model) if attending else ():
                operations = [Site("attention", name, kind=kind) for kind in get_args(AttentionKind)]
                sites += [(strategy, site) for strategy in attending.values() for site in operations]
            self._attends[model] = any(strategy.steps_in_at(site) for strategy, site in sites)
        return self._attends[model]

    def steps_in_inside_blocks(self, model: nn.Module) -> bool:
        """Whether one of the strategies works at modules or operations inside blocks."""
        return any("module" in strategy.levels for strategy in self.strategies) or self.attends_in(model)

    @property
    def number_at_guidance(self) -> int | None:
        """Which of the strategies stands in for the prediction without the prompt, if one does."""
        numbers = (number for number, strategy in enumerate(self.strategies) if strategy.works_at("guidance"))
        return next(numbers, None)

    def call_model(
        self,
        model: nn.Module,
        forward: Callable[[], Any],
        sigma: Tensor,
        contexts: Sequence[Hashable],
        labels: Sequence[str] = (),
        inputs: Sequence[Any] | None = None,
    ) -> Any:
        """Run `forward`, which calls `model` once, with the strategies in place. Returns what `forward` returns.

        The level `output` is what `model` returns. If `forward` returns the denoised latent, say so by `inputs`, all
        that it depends on: then that is kept instead once the sampler was seen to add noise. What was kept from inputs
        of other shapes is not used.

        `contexts` says whose forward pass this is, one key for each branch joined along the batch axis; whatever makes
        old features unusable (another prompt, window, shape, model instance) belongs into the key. `labels` names the
        branches in the report.
        """
        with self._alone_on(model):
            call, outer = self._new_call(model, sigma, contexts), self._call_here
            self._here.call = call
            try:
                with call.watch:
                    output = call.through(forward, inputs)
            finally:
                self._here.call = outer
                call.evaluation.ended_call(model)
        self._tell_held(call)
        with self._lock:
            self.report.add(call.record(tuple(labels) or tuple(map(str, contexts))))
        return output

    def call_attention(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one attention operation, `forward(*args, **kwargs)`, inside a model call.

        For adapters that can step in there: a model whose blocks have no attention modules has no other such site.
        """
        call = self._call_here
        return forward(*args, **kwargs) if call is None else call.attention(forward, args, kwargs)

    def call_guidance(
        self,
        model: nn.Module,
        predict: Callable[[bool, bool], tuple[Tensor | None, Tensor | None]],
        sigma: Tensor,
        context: Hashable,
        label: str = "negative",
    ) -> tuple[Tensor, Tensor]:
        """The noise predictions of one evaluation with and without the prompt, by `predict(with, without)`.

        `predict` makes model calls for those predictions that are wanted, the other is None. `context` and `label` are
        those of the branch without the prompt; both predictions have the latent's shape.
        """
        if not self.steps_in_at("guidance"):
            return predict(True, True)
        call = self._new_call(model, sigma, [("guidance", context)])
        known, self.evaluation.sigma = self.evaluation.sigma, call.sigma
        try:
            predictions, stood_in = call.guided(predict)
        finally:
            self.evaluation.sigma = known
        self._tell_held(call)
        if stood_in:
            self.report.add(call.record((label,)))
        return predictions

    def free(self) -> None:
        """Drop everything kept. The report stays."""
        with self._lock:
            self.memories.clear()
            self._plans.clear()
            self._compilations.clear()
            self._places.clear()
            self._attends.clear()
            self._in_use.clear()
            self._path = LatentPath()
            self.evaluation, self.previous = Evaluation(), Evaluation()

    def memory(self, context: Hashable, number: int, site: Site) -> Memory:
        """What this branch keeps at this site for strategy `number`."""
        key = (context, number, site)
        with self._lock:
            if key not in self.memories:
                self.memories[key] = Memory(self.strategies[number].new_state(site))
            return self.memories[key]

    def forget(self, contexts: Sequence[Hashable]) -> None:
        """Drop what these branches keep: it was made of a passage that is given up."""
        with self._lock:
            for key in [key for key in self.memories if key[0] in contexts]:
                del self.memories[key]

    def plan_of(self, model: nn.Module) -> BlockPlan:
        """The model's chains of blocks, as far as they are known."""
        return self._plans.get(model, BlockPlan())

    def must_learn(self, model: nn.Module) -> bool:
        """Whether a strategy needs the model's chains of blocks, and they are not known yet."""
        needed = any(map(_needs_blocks, self.strategies)) and model not in self._plans
        self.evaluation.is_learning |= needed
        return needed

    def compilation_of(self, model: nn.Module) -> Compilation:
        """What of the model is compiled with torch.compile."""
        with self._lock:
            if model not in self._compilations:
                self._compilations[model] = Compilation(model)
            return self._compilations[model]

    def learned(self, model: nn.Module, plan: BlockPlan) -> None:
        """The model's chains of blocks, and what else the user should know of them."""
        with self._lock:
            self._plans[model] = plan
            self._places = {place: sites for place, sites in self._places.items() if place[1] is not model}
            self._attends.pop(model, None)
            self._forget_sites_outside(plan)
        self.report.blocks = str(plan)
        for note in plan.notes:
            self.report.note(note)
        if not plan.chains:
            self.report.note("no chain of blocks was found: only the whole model's output can be cached")

    def not_learned(self, model: nn.Module, why: str, is_certain: bool) -> BlockPlan:
        """The chains that were found can't be left out: there are none.

        Unless that is certain, the model may only be different in its first call: the next calls try again.
        """
        self._lessons[model] = self._lessons.get(model, 0) + 1
        if is_certain or self._lessons[model] == MOST_LESSONS:
            self.learned(model, BlockPlan())
            self.report.note(f"the model's blocks could not be read ({why}), so they always run")
        return BlockPlan()

    def blocks_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """The model's blocks by name; before its chains are known, all that may be blocks."""
        if model in self._plans:
            return {
                name: block for chain in self._plans[model].chains for name, block in zip(chain.names, chain.blocks)
            }
        return {f"{name}.{key}": block for name, blocks in block_lists(model) for key, block in blocks.items()}

    def places(self, number: int, model: nn.Module) -> list[tuple[nn.Module, Site]]:
        """Where strategy `number` steps in on its own: at blocks, or at modules inside them."""
        if (number, model) not in self._places:
            blocks, places = self.blocks_of(model), []
            for level in self.strategies[number].levels:
                if level in _SITES_OF:
                    places += _SITES_OF[level](blocks, self.strategies[number])
                    if not blocks:
                        self.report.note(
                            f"no chain of blocks was found in this model, so level {level} has nothing to cache"
                        )
            self._places[number, model] = places
        return self._places[number, model]

    def _new_call(self, model: nn.Module, sigma: Tensor, contexts: Sequence[Hashable]) -> ModelCall:
        with self._lock:
            own = self._own_contexts(contexts)
            if not set(own) <= self.previous.seen:
                self.evaluation.all_compute = True
                self.evaluation.changes = self.previous.changes + 1
        if self.evaluation.changes == MOST_CHANGES:
            self.report.note(BRANCHES_CHANGE)
        reading = self.evaluation.sigma
        if reading is None or reading.tensor.device != sigma.device:
            reading = SigmaReading(sigma, noise_share=self.evaluation.noise_share)
        return ModelCall(self, model, reading, own)

    @property
    def _call_here(self) -> ModelCall | None:
        """The model call that runs in this thread."""
        return getattr(self._here, "call", None)

    @contextmanager
    def _alone_on(self, model: nn.Module) -> Iterator[None]:
        """Wait until no other thread calls this model: both would put hooks on its blocks."""
        with self._lock:
            in_use = self._in_use.setdefault(uncompiled(model), threading.RLock())
        with in_use:
            yield

    def _tell_held(self, call: ModelCall) -> None:
        if call.kept_something:
            with self._lock:
                self.report.held(bytes_held([memory.state for memory in self.memories.values()]))

    def _forget_branches_gone(self) -> None:
        """Drop what branches keep that were not run in the last evaluation: when they are back, it is too old to use.

        But for those left out on purpose: the model was not called for the prediction without the prompt.
        """
        seen = self.previous.seen
        if not self.previous.without_unconditional:
            for key in [key for key in self.memories if key[0] not in seen and not seen.issuperset(key[0])]:
                del self.memories[key]

    def _forget_sites_outside(self, plan: BlockPlan) -> None:
        """Drop what was kept, before the chains were known, in lists that are none."""
        names = {name for chain in plan.chains for name in chain.names}
        for key in [key for key in self.memories if key[2].level in _SITES_OF]:
            name = key[2].name
            if name not in names and not any(name.startswith(f"{block}.") for block in names):
                del self.memories[key]

    def _own_contexts(self, contexts: Sequence[Hashable]) -> tuple[Hashable, ...]:
        """Apart from other calls of the same branch in this evaluation, such as a guidance's second look."""
        own = []
        for context in contexts:
            turn = 0
            while (context, turn) in self.evaluation.seen:
                turn += 1
            self.evaluation.seen.add((context, turn))
            own.append((context, turn))
        return tuple(own)


def _needs_blocks(strategy: Strategy) -> bool:
    """Whether it works at blocks, along them or inside them."""
    return any(strategy.works_at(level) for level in ("model", "block", "module", "attention"))


def _blocks(blocks: dict[str, nn.Module], strategy: Strategy) -> list[tuple[nn.Module, Site]]:
    return [(block, Site("block", name)) for name, block in blocks.items()]


def _modules_inside(blocks: dict[str, nn.Module], strategy: Strategy) -> list[tuple[nn.Module, Site]]:
    """The modules that the strategy chooses in each block."""
    places: dict[str, nn.Module] = {}
    for name, block in blocks.items():
        modules = {name: block} | _running_inside(name, block)
        chosen = strategy.modules_in(name, [path for path in modules if path != name])
        places |= {path: modules[path] for path in chosen}
    return [(module, Site("module", name)) for name, module in _without_inner(places).items()]


def _attention_inside(blocks: dict[str, nn.Module], strategy: Strategy) -> list[tuple[nn.Module, Site]]:
    """The attention modules in each block; those it does not step in at too, as what runs in them is no site."""
    modules = {
        path: module
        for name, block in blocks.items()
        for path, module in _running_inside(name, block).items()
        if is_attention(path)
    }
    return [
        (module, Site("attention", name, kind=kind_of(name, module)))
        for name, module in _without_inner(modules).items()
    ]


_SITES_OF = {"block": _blocks, "module": _modules_inside, "attention": _attention_inside}


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
