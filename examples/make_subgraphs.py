"""`python examples/make_subgraphs.py`: each of about/subgraphs.json as a blueprint of ComfyUI's node library.

Needs a ComfyUI, which is asked for the order of its nodes' widgets.
"""

from __future__ import annotations

import json
import sys
import uuid
from typing import Any

from make_workflows import GAP, HERE, NARROW, inputs_of, is_link

SUBGRAPHS = HERE.parent / "subgraphs"
ABOUT = HERE / "about" / "subgraphs.json"
INPUT, OUTPUT = -10, -20  # the ids that links have at the two ends of a subgraph
COLUMN = NARROW + 2 * GAP  # pixels
CONTROL = "control_after_generate"  # the widget behind a seed


def main() -> None:
    """Write all of them."""
    sys.path.insert(0, str(HERE.parent))
    from cache_core.demo.server import Server

    with Server() as server:
        info = server.get("/object_info")
    for name, about in json.loads(ABOUT.read_text(encoding="utf-8")).items():
        (SUBGRAPHS / f"{name}.json").write_text(text(blueprint(name, about, info)), encoding="ascii")
        print(name)


def text(made: dict[str, Any]) -> str:
    """What the file holds: ASCII, as ComfyUI 0.8 reads it in the machine's own encoding."""
    return json.dumps(made, indent=1) + "\n"


def blueprint(name: str, about: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A prompt (API format) as a subgraph, in a workflow that has one node of that kind.

    What a node requires and the prompt leaves open comes from outside, by the name that the node has for it.
    """
    own = str(uuid.uuid5(uuid.NAMESPACE_URL, f"refrain/subgraphs/{name}"))
    nodes = {number: _node(int(number), node, info[node["class_type"]]) for number, node in about["prompt"].items()}
    taken, given, links = _linked(about, nodes, info)
    subgraph = {
        "id": own,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes) + 1, "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": name,
        "description": about["description"],
        "category": "Refrain",
        "inputNode": {"id": INPUT, "bounding": [-COLUMN, 0, 120, 40 + 20 * len(taken)]},
        "outputNode": {"id": OUTPUT, "bounding": [COLUMN * len(nodes), 0, 120, 40 + 20 * len(given)]},
        "inputs": [_end(own, slot) for slot in taken.values()],
        "outputs": [_end(own, slot) for slot in given.values()],
        "widgets": [],
        "nodes": [*nodes.values()],
        "groups": [],
        "links": links,
        "extra": {},
    }
    one = {
        "id": len(nodes) + 1,
        "type": own,
        "pos": [0, 0],
        "size": [340, 60 + 26 * len(taken)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{**slot, "link": None} for slot in taken.values()],
        "outputs": [{**slot, "links": []} for slot in given.values()],
        "properties": {},
        "widgets_values": [],
        "title": name,
    }
    for slot in (*one["inputs"], *one["outputs"]):
        slot.pop("linkIds")
    return {
        "revision": 0,
        "last_node_id": one["id"],
        "last_link_id": 0,
        "nodes": [one],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {},
    }


def _node(number: int, node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """As the page saves it: first what is connected, then what is typed in."""
    slots, values = [], []
    for name, (kind, *settings) in inputs_of(info).items():
        slots.append({"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "link": None})
        if is_link(kind):
            continue
        slots[-1]["widget"] = {"name": name}
        own = settings[0] if settings else {}
        choices = kind if isinstance(kind, list) else own.get("options", [None])
        values.append(node["inputs"].get(name, own.get("default", choices[0])))
        if own.get(CONTROL):
            values.append(node["inputs"].get(CONTROL, "randomize"))
    return {
        "id": number,
        "type": node["class_type"],
        "pos": [COLUMN * (number - 1), 0],
        "size": [NARROW, 60 + 20 * len(slots)],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": sorted(slots, key=lambda slot: "widget" in slot),
        "outputs": [
            {"name": name, "type": kind, "links": []} for name, kind in zip(info["output_name"], info["output"])
        ],
        "properties": {"Node name for S&R": node["class_type"]},
        "widgets_values": values,
    }


def _linked(about: dict, nodes: dict[str, dict], info: dict) -> tuple[dict[str, dict], dict[str, dict], list[dict]]:
    """What the subgraph takes and gives, by name, and its links, which the slots of its nodes then know too."""
    taken, given, links = {}, {}, []

    def link(origin: int, output: int, target: int, input_: int, kind: str) -> int:
        ends = {"origin_id": origin, "origin_slot": output, "target_id": target, "target_slot": input_}
        links.append({"id": len(links) + 1, **ends, "type": kind})
        return len(links)

    for number, node in nodes.items():
        asked = about["prompt"][number]
        for at, slot in enumerate(node["inputs"]):
            value = asked["inputs"].get(slot["name"])
            if isinstance(value, list):
                source = nodes[value[0]]
                slot["link"] = link(source["id"], value[1], node["id"], at, slot["type"])
                source["outputs"][value[1]]["links"].append(slot["link"])
            elif value is None and slot["name"] in info[asked["class_type"]]["input"]["required"]:
                end = {key: part for key, part in slot.items() if key != "link"} | {"linkIds": []}
                end = taken.setdefault(slot["name"], end)
                slot["link"] = link(INPUT, list(taken).index(slot["name"]), node["id"], at, slot["type"])
                end["linkIds"].append(slot["link"])
    for at, (name, (number, output)) in enumerate(about["outputs"].items()):
        slot = nodes[number]["outputs"][output]
        slot["links"].append(link(nodes[number]["id"], output, OUTPUT, at, slot["type"]))
        given[name] = {"name": name, "type": slot["type"], "linkIds": slot["links"][-1:]}
    return taken, given, links


def _end(own: str, slot: dict[str, Any]) -> dict[str, Any]:
    """A slot at an end of the subgraph of this id."""
    return {"id": str(uuid.uuid5(uuid.UUID(own), slot["name"]))} | {
        key: slot[key] for key in ("name", "type", "linkIds")
    }


if __name__ == "__main__":
    main()
