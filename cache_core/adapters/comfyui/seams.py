"""What of docs/seams.md this ComfyUI lacks: what then is computed, and the sentences that say so.

Names that may move are taken from ComfyUI here. One that has moved is None, and the nodes load all the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from ...run.run import CacheRun

try:
    from comfy.model_patcher import ModelPatcher
except ImportError:
    ModelPatcher = None
try:
    from comfy.model_sampling import CONST, ModelSamplingDiscrete
except ImportError:
    CONST = ModelSamplingDiscrete = None
try:
    from comfy.patcher_extension import WrappersMP
except ImportError:
    WrappersMP = None
try:
    from comfy.patcher_extension import CallbacksMP
except ImportError:
    CallbacksMP = None

KEY = "refrain"
MOVED = (AttributeError, KeyError, TypeError)  # what Python says of a name, an option or a parameter that has moved
WRAPPERS = {
    name: getattr(WrappersMP, name, None)
    for name in ("OUTER_SAMPLE", "PREDICT_NOISE", "CALC_COND_BATCH", "APPLY_MODEL", "PREPARE_SAMPLING")
}
ON_PRE_RUN = getattr(CallbacksMP, "ON_PRE_RUN", None)
METHODS = (
    *("clone", "add_wrapper_with_key", "remove_wrappers_with_key", "set_attachments", "get_attachment"),
    *("add_callback_with_key", "remove_callbacks_with_key", "get_model_object"),
)
NOTHING_WORKS = "no cache works: this ComfyUI has no {}"
NO_GUIDANCE = "the negative prompt always runs: this ComfyUI has no WrappersMP.CALC_COND_BATCH"
OTHERWISE = "{}: this ComfyUI is not as docs/seams.md says ({})"


def wrapper_type(name: str) -> str | None:
    """What ComfyUI calls a kind of wrapper, `OUTER_SAMPLE`; None if it has none."""
    return WRAPPERS[name]


def _lacking() -> str:
    """Without these names there can be no run at all."""
    known = {f"ModelPatcher.{name}": getattr(ModelPatcher, name, None) for name in METHODS}
    known |= {f"WrappersMP.{name}": wrapper_type(name) for name in ("OUTER_SAMPLE", "APPLY_MODEL")}
    known |= {"model_sampling.CONST": CONST, "model_sampling.ModelSamplingDiscrete": ModelSamplingDiscrete}
    return ", ".join(name for name, found in known.items() if found is None)


LACKING = _lacking()
WHY_NOTHING_WORKS = NOTHING_WORKS.format(LACKING) if LACKING else ""


def otherwise(what: str, error: Exception) -> str:
    """A sentence: what follows from something that ComfyUI does not have, or calls by another name."""
    return OTHERWISE.format(what, f"{type(error).__name__}: {error}")


def run_in(options: Any) -> CacheRun | None:
    """The run that travels in these transformer options, or in the options of a model that have them."""
    if not isinstance(options, dict):
        return None
    return options.get(KEY) or run_in(options.get("transformer_options"))


def fitting(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper of ComfyUI's. Calls with arguments that it does not know go on as they came, and the run says so."""
    signature = inspect.signature(wrapper)

    @cache
    def misfit(count: int, names: tuple[str, ...]) -> TypeError | None:
        try:
            signature.bind(*range(count), **dict.fromkeys(names))
        except TypeError as error:
            return error
        return None

    @wraps(wrapper)
    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if error := misfit(1 + len(args), tuple(kwargs)):
            for run in filter(None, map(run_in, (*args, *kwargs.values(), kwargs))):
                run.pass_over(otherwise(f"{wrapper.__name__} is passed over", error))
            return executor(*args, **kwargs)
        return wrapper(executor, *args, **kwargs)

    return around
