"""ComfyUI's workflow files as prompts, without its page: subgraphs, bypassed nodes and reroutes are resolved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

INPUT, OUTPUT = -10, -20  # the two ends of a subgraph, as the origin and the target of links
NEVER, BYPASSED = 2, 4  # modes of a node
NOTES = ("Note", "MarkdownNote")
VIRTUAL = (*NOTES, "Reroute", "PrimitiveNode")  # they exist in the page only
DRAWN = (
    "IMAGECOMPARE",
    "BOUNDING_BOX",
    "BOUNDING_BOXES",
    "LOAD_3D",
    "COLORS",
    "CURVE",
)  # widgets with a value of parts
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "PAINTER", "COMFY_DYNAMICCOMBO_V3", *DRAWN)
SEEDS = ("seed", "noise_seed")  # the page puts "what to do after a run" behind each


@dataclass
class Node:
    """A node of a prompt, with the types of its slots as the workflow has them."""

    kind: str
    inputs: dict[str, Any]
    takes: dict[str, str] = field(default_factory=dict)
    gives: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """The inputs that the models to sample with come in by; none if this neither samples nor guides."""
        if "MODEL" in self.gives or not {"GUIDER", "LATENT"} & {*self.gives}:
            return []
        return [name for name, kind in self.takes.items() if kind == "MODEL" and name in self.inputs]

    @property
    def samples(self) -> bool:
        """Whether latents are denoised here."""
        return "LATENT" in self.gives and bool(self.models or "GUIDER" in self.takes.values())


@dataclass(frozen=True)
class Typed:
    """A value that a primitive gives."""

    value: Any


def nodes_of(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, Node]:
    """The nodes that the page would queue, by their ids there: "7", or "7:3" in the subgraph 7.

    `info` is ComfyUI's /object_info. What it lacks keeps its links only. A value on a subgraph's own node counts if it
    was saved with its name; else that of the first widget inside that it is for.
    """
    kinds = {each["id"]: each for each in workflow.get("definitions", {}).get("subgraphs", [])}
    return dict(_Graph(workflow, kinds, info).queued())


class _Graph:
    """A workflow, or one use of a subgraph in it."""

    def __init__(self, definition: dict, kinds: dict, info: dict, prefix: str = "", outer: tuple | None = None) -> None:
        self.definition, self.kinds, self.info, self.prefix, self.outer = definition, kinds, info, prefix, outer
        self.nodes = {node["id"]: node for node in definition["nodes"]}
        self.links = {link[0]: link[1:5] for link in map(_ends, definition["links"])}
        self._inner: dict[int, _Graph] = {}

    def inner(self, node: dict) -> _Graph:
        if node["id"] not in self._inner:
            prefix = f"{self.prefix}{node['id']}:"
            self._inner[node["id"]] = _Graph(self.kinds[node["type"]], self.kinds, self.info, prefix, (self, node))
        return self._inner[node["id"]]

    def queued(self) -> Iterator[tuple[str, Node]]:
        for node in self.nodes.values():
            if node.get("mode") in (NEVER, BYPASSED) or node["type"] in VIRTUAL:
                continue
            if node["type"] in self.kinds:
                yield from self.inner(node).queued()
                continue
            inputs = {name: _sent(value) for name, value in self._typed(node).items()}
            for slot in node.get("inputs") or []:
                source = None if slot.get("link") is None else self.source(slot["link"])
                if source is not None:
                    inputs[slot["name"]] = _sent(source.value) if isinstance(source, Typed) else source
            takes = {slot["name"]: slot["type"] for slot in node.get("inputs") or []}
            gives = [slot["type"] for slot in node.get("outputs") or []]
            yield f"{self.prefix}{node['id']}", Node(node["type"], inputs, takes, gives)

    def source(self, link: int) -> list | Typed | None:
        """What this link brings in the end: [node, output], a value, or nothing."""
        if link not in self.links:
            return None
        origin, output, *_ = self.links[link]
        if origin == INPUT:
            return self._from_outside(output)
        node = self.nodes[origin]
        if node.get("mode") == NEVER:
            return None
        if node.get("mode") == BYPASSED:
            return self._through(node, output)
        if node["type"] == "Reroute":
            return self._of(node["inputs"][0])
        if node["type"] == "PrimitiveNode":
            return Typed(node["widgets_values"][0])
        if node["type"] in self.kinds:
            inner = self.inner(node)
            ends = [number for number, (_, _, *target) in inner.links.items() if target == [OUTPUT, output]]
            return inner.source(ends[0]) if ends else None
        return [f"{self.prefix}{origin}", output]

    def _of(self, slot: dict) -> list | Typed | None:
        return None if slot.get("link") is None else self.source(slot["link"])

    def _from_outside(self, input_: int) -> list | Typed | None:
        if self.outer is None:
            return None
        graph, node = self.outer
        name = self.definition["inputs"][input_]["name"]
        linked = next((graph._of(slot) for slot in node.get("inputs") or [] if slot["name"] == name), None)
        if linked is not None:
            return linked
        named = node.get("widgets_values_named", {})
        return Typed(named[name]) if name in named else self._shown(name)

    def _shown(self, input_: str) -> Typed | None:
        """What the page shows for an input that is not linked: the value of the first widget inside that it is for."""
        names = [each["name"] for each in self.definition["inputs"]]
        for origin, output, target, slot in self.links.values():
            if origin != INPUT or names[output] != input_ or target == OUTPUT:
                continue
            node = self.nodes[target]
            name, values = node["inputs"][slot]["name"], self._typed(node)
            shown = self.inner(node)._shown(name) if node["type"] in self.kinds else Typed(values.get(name))
            if shown is not None and shown.value is not None:
                return shown
        return None

    def _typed(self, node: dict) -> dict[str, Any]:
        return typed(node, self.info.get(node["type"], {}))

    def _through(self, node: dict, output: int) -> list | Typed | None:
        """A bypassed node hands on the input of the same place if it fits, else one of its type, else any."""
        kind, slots = node["outputs"][output]["type"], node.get("inputs") or []
        same_type = [slot for slot in slots if slot["type"] == kind]
        for slot in [*slots[output : output + 1], *same_type, *slots]:
            if _fits(slot["type"], kind):
                return self._of(slot)
        return None


def typed(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by the names of its inputs. Those that were saved with names need no order."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        return dict(saved)
    values, found = iter(saved), {}
    for name, kind, settings in widgets(info):
        try:
            found[name] = next(values)
        except StopIteration:  # an input that came later keeps what it comes with
            if "default" in settings:
                found[name] = settings["default"]
            continue
        if name in SEEDS or settings.get("control_after_generate"):
            next(values, None)
        if kind == "COMFY_DYNAMICCOMBO_V3":
            chosen = [option for option in settings["options"] if option["key"] == found[name]]
            for inner, _, own in widgets({"input": chosen[0]["inputs"]} if chosen else {}):
                found[f"{name}.{inner}"] = next(values, own.get("default"))
    return found | {name: value for name, value in node.get("widgets_values_named", {}).items() if name in found}


def widgets(info: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, type and settings of what is typed or chosen in a node, in the order of the page."""
    inputs = info.get("input", {})
    for name, (kind, *settings) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
        own = settings[0] if settings else {}
        of_kind = "COMBO" if isinstance(kind, list) else own.get("widgetType", kind)
        if of_kind in WIDGETS and not own.get("forceInput"):
            first = {"default": kind[0]} if isinstance(kind, list) and kind else {}
            first |= {"default": {}} if of_kind in DRAWN else {}
            yield name, of_kind, {**first, **own}


def _sent(value: Any) -> Any:
    """A value as the page sends it: a list says that it is no link."""
    return {"__value__": value} if isinstance(value, list) else value


def _fits(one: str, other: str) -> bool:
    """Whether slots of these types may be linked: "IMAGE,MASK" takes either, and "*" all."""
    return "*" in (one, other) or bool({*one.split(",")} & {*other.split(",")})


def _ends(link: list | dict[str, Any]) -> list:
    """[id, from node, from slot, to node, to slot], of both forms of a link."""
    if isinstance(link, list):
        return link[:5]
    return [link[name] for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
