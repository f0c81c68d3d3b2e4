"""Why no cached sampling run made some samples, in words: what of this pack is in the prompt, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..cache_core.adapters.comfyui import WHY_NOTHING_WORKS
from ..cache_core.strategies import all_strategies

NOTHING = (
    "No cached sampling run made these samples. Connect a Refrain cache node between the model and the sampler, and "
    "this node's samples input to the sampler."
)
BYPASSED = 'No cached sampling run made these samples: "{title}" is bypassed or muted.'
DECLINED = (
    "No cached sampling run made these samples: {title} handed the model on without a cache. "
    "The text in {source} says why."
)
LACKING = "No cached sampling run made these samples: {}."
UNKNOWN = (
    'The run that made these samples is not known, though "{title}" is connected. Either its sampler is not one of '
    "ComfyUI's, or the run is too long ago: those of the last {most} are kept."
)
CHOSEN = {
    "RefrainCachePreset": "Faster Sampling",
    "RefrainFindSettings": "Find Cache Settings",
    "RefrainApplySettings": "Apply Cache Settings",
}
STRATEGIES = {f"Refrain{strategy.__name__}": f"Apply {strategy.title}" for strategy in all_strategies()}
CACHES = CHOSEN | STRATEGIES
LEFT_OUT = (2, 4)  # the browser's modes of a node: muted, bypassed


def why(node_id: str, prompt: Any, extra_pnginfo: Any, most: int) -> str:
    """A sentence for the node of this id, from the prompt and, where a browser queued it, its workflow."""
    found = [prompt[name]["class_type"] for name in _before(prompt or {}, node_id)]
    cached = [CACHES[kind] for kind in found if kind in STRATEGIES]
    chosen = [CACHES[kind] for kind in found if kind in CHOSEN]
    if (cached or chosen) and WHY_NOTHING_WORKS:
        return LACKING.format(WHY_NOTHING_WORKS)
    if cached:
        return UNKNOWN.format(title=cached[0], most=most)
    if chosen:
        sources = [title for title in chosen if title != CHOSEN["RefrainApplySettings"]]
        return DECLINED.format(title=chosen[0], source=next(iter(sources), CHOSEN["RefrainCachePreset"]))
    return next((BYPASSED.format(title=title) for title in _left_out(extra_pnginfo)), NOTHING)


def _before(prompt: dict[str, Any], node_id: str) -> list[str]:
    """All nodes that this one's inputs come from, nearest first."""
    found = [node_id] if node_id in prompt else []
    for name in found:
        links = [value for value in prompt[name]["inputs"].values() if isinstance(value, list) and value]
        found += dict.fromkeys(str(link[0]) for link in links if str(link[0]) in prompt and str(link[0]) not in found)
    return found


def _left_out(extra_pnginfo: Any) -> Iterator[str]:
    """Titles of the cache nodes, and of subgraphs with some, that are not in the prompt."""
    workflow = _part(extra_pnginfo, "workflow", dict)
    subgraphs = [graph for graph in _part(_part(workflow, "definitions", dict), "subgraphs", list) if _is_dict(graph)]
    holders = {graph.get("id") for graph in subgraphs if any(node.get("type") in CACHES for node in _nodes(graph))}
    for graph in [workflow, *subgraphs]:
        for node in _nodes(graph):
            kind = node.get("type")
            if node.get("mode") in LEFT_OUT and (kind in CACHES or kind in holders):
                yield str(node.get("title") or CACHES.get(kind, "the subgraph with the cache"))


def _nodes(graph: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in _part(graph, "nodes", list) if _is_dict(node)]


def _part(of: Any, name: str, kind: type) -> Any:
    """What a client sent under this name, if it is of this kind: anyone may send anything."""
    part = of.get(name) if _is_dict(of) else None
    return part if isinstance(part, kind) else kind()


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)
