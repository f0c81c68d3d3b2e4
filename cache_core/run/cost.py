"""What a model call still costs in which a strategy reuses: the share of the model's work that runs all the same."""

from ..model import weights_in
from ..strategy import Site, Strategy
from .state import CallState


def note_work(call: CallState) -> None:
    """The model was learned: how much of its work each part does that may be left out, as all ranks see it.

    As counted in the call that taught; by parameters where nothing was, as in compiled models.
    """
    model = call.model
    parts = {"": model.module}  # the whole
    for chain in model.plan.chains:
        parts |= dict(zip(chain.names, chain.blocks))
    for sites in model.sites.of.values():
        parts |= {site.name: module for module, site in sites}
    counted = model.counter.work
    work = [float(counted.get(name, 0) if counted.get("") else weights_in(part)) for name, part in parts.items()]
    shares = [each / (work[0] or 1.0) for each in work]
    model.shares = dict(zip(parts, call.run.terms.ranks.largest(shares, call.sigma.tensor.device)))


def cost_of_reuse(call: CallState, strategy: Strategy, site: Site) -> float | None:
    """Of the work of a computed call. None while that is not known.

    It stays as it is in the second evaluation: by then it is known what is left out of the cache for want of memory.
    """
    model = call.model
    if site.level == "output":
        return 0.0
    if strategy not in model.costs and model.shares and call.evaluation.before is not None:
        left_out = sum(model.shares.get(name, 0.0) for name in _skipped(call, strategy))
        model.costs[strategy] = cost = min(max(1 - left_out, 0.0), 1.0)
        if call.run.repair is not None and (why := strategy.why_unrepaired(call.run.terms.schedule, cost)):
            call.run.leave_unrepaired(why)  # so few steps are computed
    return model.costs.get(strategy)


def _skipped(call: CallState, strategy: Strategy) -> list[str]:
    """The parts that do not run in a call in which the strategy reuses."""
    plan, excluded = call.model.plan, call.run.memories.excluded
    if "model" not in strategy.levels:
        return [site.name for _, site in call.model.sites.of[strategy] if (strategy, site) not in excluded]
    names = [name for chain in plan.chains for name in chain.names]
    return names[plan.runs_first or (strategy.tests_first_block and len(names) > 1) :]
