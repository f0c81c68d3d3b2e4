"""`python examples/make_workflows.py`: each of examples/api/ as a workflow for the template browser, and a card.

The demo of videos as well, whose thumbnail is by benchmarks/video_pictures.py.

Needs Pillow and a ComfyUI, which is asked for the order of its nodes' widgets.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORKFLOWS = HERE.parent / "example_workflows"
API = HERE / "api"
NOTE = "note"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
GAP, TITLE, ROW = 30, 30, 26  # pixels
WIDTH, HEIGHT = 1750, 1100  # of a workflow: a window of 1440 x 900 then opens it at 0.61 of its size, readable
NARROW, SHOWN = 270, 340  # of a column; of one with something that is drawn after a run
SMALL = (  # nothing to set: collapsed to their titles
    *("VAEDecode", "VAEDecodeAudio", "LTXVAudioVAEDecode", "CreateVideo", "ConditioningZeroOut"),
    *("LTXVConcatAVLatent", "LTXVSeparateAVLatent"),
)
DRAWN = {  # height; a node that ComfyUI lacks is drawn with a line that says so
    **{"RefrainCacheReport": 430, "SaveImage": 400, "SaveVideo": 260, "LoadImage": 350},
    **{"QwenImage21Cache": 130, "MarkdownNote": 390},
    **{"RefrainLoadVideoDemo": 90, "RefrainPyramidAttentionBroadcast": 452, "RefrainCachePreset": 400},
}
LONG, MORE = 1260, 70  # so many characters fill a note in Nodes 2.0; one of more is as much higher


def main() -> None:
    """Write all of them."""
    sys.path.insert(0, str(HERE.parent))  # not for who imports this: our `nodes` would hide ComfyUI's
    from cards import card

    from cache_core.demo.server import Server

    models = json.loads((HERE / "about" / "models.json").read_text(encoding="utf-8"))
    notes = json.loads((HERE / "about" / "notes.json").read_text(encoding="utf-8"))
    with Server() as server:
        info = newer_nodes() | server.get("/object_info")
    for name, file in prompts().items():
        prompt = json.loads(file.read_text(encoding="utf-8"))
        made = workflow(prompt, info, models, notes[name])
        (WORKFLOWS / f"{name}.json").write_text(_text(made), encoding="utf-8")
        if file.parent == API:
            card(notes[name]).save(WORKFLOWS / f"{name}.jpg", quality=90, optimize=True)
        print(name)


def prompts() -> dict[str, Path]:
    """The prompt in API format of each workflow that is made here, by its name. Others of the demo are made by hand."""
    video = HERE.parent / "cache_core" / "demo" / "workflows" / "video.json"
    return {file.stem: file for file in sorted(API.glob("*.json"))} | {"refrain_demo_video": video}


def newer_nodes() -> dict[str, Any]:
    """Nodes that the examples have and no ComfyUI at hand, as ComfyUI's help for them says (comfyui-embedded-docs)."""
    return json.loads((HERE / "about" / "newer_nodes.json").read_text(encoding="utf-8"))


def workflow(prompt: dict[str, Any], info: dict[str, Any], models: dict[str, Any], note: dict[str, Any]) -> dict:
    """A prompt (API format) as a workflow (what ComfyUI saves): placed in columns from left to right, with a note."""
    links = _links(prompt, info)
    text = _words(note, prompt, models)
    places = _places(prompt, info, DRAWN["MarkdownNote"] + MORE * (len(text) > LONG))
    nodes = [
        _node(int(number), places[number], node, info[node["class_type"]], links, models)
        for number, node in prompt.items()
    ]
    nodes.append(_note(len(prompt) + 1, places[NOTE], text))
    for order, node in enumerate(nodes):
        node["order"] = order
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def inputs_of(info: dict[str, Any]) -> dict[str, list]:
    """A node's inputs in the order of its widgets: name: [type, settings]. Of several types the widget's counts."""
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    widgets = {name: given[1].get("widgetType", given[0]) for name, given in inputs.items() if len(given) > 1}
    return {name: [widgets.get(name, kind), *settings] for name, (kind, *settings) in inputs.items()}


def is_link(kind: Any) -> bool:
    """Whether an input of this type is connected, not typed in."""
    return isinstance(kind, str) and kind not in WIDGETS


def _links(prompt: dict[str, Any], info: dict[str, Any]) -> list[list]:
    """[id, from node, from slot, to node, to slot, type] of each."""
    links: list[list] = []
    for number, node in prompt.items():
        sockets = [name for name, (kind, *_) in inputs_of(info[node["class_type"]]).items() if is_link(kind)]
        for slot, name in enumerate(name for name in sockets if name in node["inputs"]):
            source, output = node["inputs"][name]
            kind = info[prompt[source]["class_type"]]["output"][output]
            links.append([len(links) + 1, int(source), output, int(number), slot, kind])
    return links


def _places(prompt: dict[str, Any], info: dict[str, Any], note: int) -> dict[str, tuple[list[int], list[int]]]:
    """Position and size of each node, and of the note, so high: in columns as few and as low as they can be, in
    the order of a run from left to right. Raises ValueError if they do not fit into a window.
    """

    def depth(number: str) -> int:
        sources = [value[0] for value in prompt[number]["inputs"].values() if isinstance(value, list)]
        return 1 + max(map(depth, sources), default=0)

    kinds = {NOTE: "MarkdownNote", **{number: node["class_type"] for number, node in prompt.items()}}
    heights = {NOTE: note}
    heights |= {number: _height(node, info[node["class_type"]]) for number, node in prompt.items()}
    order = [NOTE, *sorted(prompt, key=depth)]
    for most in (4, 5):
        for lowest in range(500, HEIGHT + 1, 10):
            columns = _columns(order, heights, lowest, most)
            widths = [SHOWN if any(_draws(kinds[number]) for number in column) else NARROW for column in columns]
            spare = WIDTH - sum(widths) - GAP * (len(widths) - 1)
            if sum(map(len, columns)) == len(order) and spare >= 0:
                wider = min(spare // len(widths), 60)
                return _placed(columns, [width + wider for width in widths], heights)
    raise ValueError(
        f"{len(prompt)} nodes do not fit into {WIDTH} x {HEIGHT} pixels: collapse some, or make them smaller."
    )


def _columns(order: list[str], heights: dict[str, int], lowest: int, most: int) -> list[list[str]]:
    """The nodes in order, in columns that end above this. What comes last may go back to where there is room."""
    columns: list[list[str]] = [[]]

    def has_room(column: list[str], number: str) -> bool:
        return sum(heights[other] + TITLE + GAP for other in column) + TITLE + heights[number] <= lowest

    for number in order:
        if not has_room(columns[-1], number) and len(columns) < most:
            columns.append([])
        for column in reversed(columns) if len(columns) == most else columns[-1:]:
            if has_room(column, number):
                column.append(number)
                break
    return columns


def _placed(
    columns: list[list[str]], widths: list[int], heights: dict[str, int]
) -> dict[str, tuple[list[int], list[int]]]:
    places, left = {}, 40
    for column, width in zip(columns, widths):
        top = 60
        for number in column:
            places[number] = ([left, top], [width, heights[number]])
            top += heights[number] + TITLE + GAP
        left += width + GAP
    return places


def _draws(kind: str) -> bool:
    return kind.startswith("Refrain") or kind in DRAWN


def _height(node: dict[str, Any], info: dict[str, Any]) -> int:
    if node["class_type"] in SMALL:
        return 0
    if node["class_type"] in DRAWN:
        return DRAWN[node["class_type"]]
    sockets = sum(is_link(kind) for kind, *_ in inputs_of(info).values())
    typed = sum(not isinstance(value, list) for value in node["inputs"].values())
    texts = sum(settings[0].get("multiline", False) for _, *settings in inputs_of(info).values() if settings)
    strip = 146 if node["class_type"].startswith("Refrain") else 0
    return 20 + 20 * max(sockets, len(info["output"])) + 25 * typed + 65 * texts + strip


def _node(number: int, place: tuple, node: dict[str, Any], info: dict, links: list[list], models: dict) -> dict:
    sockets = [name for name, (kind, *_) in inputs_of(info).items() if is_link(kind) and name in node["inputs"]]
    entering = {link[4]: link[0] for link in links if link[3] == number}
    leaving = [[link[0] for link in links if link[1] == number and link[2] == at] for at in range(len(info["output"]))]
    kinds = inputs_of(info)
    files = [value for value in node["inputs"].values() if isinstance(value, str) and value in models]
    properties: dict[str, Any] = {"Node name for S&R": node["class_type"]}
    if files:
        properties["models"] = [{"name": file, **models[file]} for file in files]
    return {
        "id": number,
        "type": node["class_type"],
        "pos": place[0],
        "size": [place[1][0], max(26, place[1][1])],
        "flags": {"collapsed": True} if node["class_type"] in SMALL else {},
        "order": 0,
        "mode": 0,
        "inputs": [{"name": name, "type": kinds[name][0], "link": entering[at]} for at, name in enumerate(sockets)],
        "outputs": [
            {"name": name, "type": kind, "slot_index": at, "links": leaving[at]}
            for at, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
        ],
        "title": node["_meta"]["title"],
        "properties": properties,
        "widgets_values": _typed(node["inputs"], kinds),
    }


def _typed(inputs: dict[str, Any], kinds: dict[str, list]) -> list[Any]:
    values: list[Any] = []
    for name, (kind, *settings) in kinds.items():
        if is_link(kind) or name not in inputs:
            continue
        values.append(inputs[name])
        if settings and settings[0].get("control_after_generate"):
            values.append("fixed")  # the widget that changes the seed after a run
    return values


def _words(note: dict[str, Any], prompt: dict[str, Any], models: dict[str, Any]) -> str:
    used = [value for node in prompt.values() for value in node["inputs"].values() if str(value) in models]
    files = "\n".join(f"- `models/{models[file]['directory']}/`[{file}]({models[file]['url']})" for file in used)
    return f"## {note['title']}\n\n{note['text']}\n" + (f"\n### Files\n\n{files}\n" if files else "")


def _note(number: int, place: tuple, text: str) -> dict:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": place[0],
        "size": place[1],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "Read me",
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


def _text(made: dict[str, Any]) -> str:
    """JSON with short lists on one line, so that people can read and compare it."""
    text = json.dumps(made, indent=2, ensure_ascii=False)
    short = re.compile(r"\[\s+((?:(?:-?[\d.]+|\"[^\"\n]*\"|true|false|null),?\s+)+)\]")
    return short.sub(lambda found: "[" + ", ".join(re.split(r",\s+", found[1].strip())) + "]", text) + "\n"


if __name__ == "__main__":
    main()
