"""Which steps are computed when the schedule alone decides."""

from __future__ import annotations

from collections.abc import Sequence


def published_steps(count: int, warm_up: int, interval: int) -> list[int]:
    """Steps that a warm-up and a constant interval compute: the first `warm_up`, then the last of every `interval`.

    >>> published_steps(20, warm_up=3, interval=5)
    [0, 1, 2, 7, 12, 17]
    """
    return [index for index in range(count) if index < warm_up or (index - warm_up + 1) % interval == 0]


def sigma_spaced_steps(sigmas: Sequence[float], warm_up: int, interval: int) -> list[int]:
    """The same number of steps, at the sigmas where an evenly spaced schedule would compute them.

    A shifted schedule crowds its steps at high noise, where the output hardly changes from one to the next, and strides
    at low noise. Spaced by index, the computed steps do so too, and what is forecast then loses to taking fewer steps.
    On an evenly spaced schedule both rules choose the same steps. `sigmas` is the whole schedule with its end.
    """
    count = len(sigmas) - 1
    first, last = sigmas[0], sigmas[-1]
    chosen: set[int] = set()
    for index in published_steps(count, warm_up, interval):
        target = first + (last - first) * index / count
        free = (step for step in range(count) if step not in chosen)
        chosen.add(min(free, key=lambda step: abs(sigmas[step] - target)))
    return sorted(chosen)
