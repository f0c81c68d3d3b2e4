"""`python benchmarks/templates.py FOLDER`: our nodes in every official template that samples, checked by ComfyUI.

FOLDER has the templates and their index.json: `pip download --no-deps comfyui-workflow-templates-json`, unpacked. Each
template becomes the prompt that the page would queue, with one of our nodes before every sampler and guider. A private
ComfyUI says what it would refuse. `--write` writes docs/templates.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from template_prompts import Node, nodes_of, widgets

from cache_core.demo.server import Server

HERE = Path(__file__).resolve().parent
WORDS = (HERE / "templates.md").read_text(encoding="utf-8")  # the page, with places for the numbers
PAGE = HERE.parent / "docs" / "templates.md"
CACHES = (
    "RefrainFirstBlockCache",
    "RefrainTaylorSeerCache",
    "RefrainPyramidAttentionBroadcast",
    "RefrainFasterCache",
    "RefrainCachePreset",
)
SETTINGS, REPORT = "RefrainApplySettings", "RefrainCacheReport"
OURS = (*CACHES, SETTINGS, REPORT)
NAMES = json.loads((HERE.parent / "node_list.json").read_text(encoding="utf-8"))
FILE = re.compile(
    r"\.(safetensors|sft|gguf|ckpt|pth?|bin|onnx|png|jpe?g|webp|gif|mp[34]|wav|flac|mov|webm|glb|ply)\b", re.IGNORECASE
)


@dataclass
class Checked:
    """One template: the nodes that this ComfyUI lacks, and what it refuses without ours and with each."""

    name: str
    samplers: int
    inside: int  # so many of them in subgraphs
    lacking: list[str]
    refused: list[str]
    changed: dict[str, list[str]]

    @property
    def accepts(self) -> list[str]:
        """Those of our nodes with which it refuses just what it refused without."""
        return [kind for kind in OURS if not self.changed[kind]]


def main() -> None:
    """Check all, print the page, and write it if wished."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where index.json and the templates are")
    parser.add_argument("--version", default="", help="of the templates, for the page")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    chosen = parser.parse_args()
    names = template_names(chosen.folder)
    with served() as server:
        info, version = server.get("/object_info"), server.get("/system_stats")["system"]["comfyui_version"]
        checked = [each for name in names if (each := check(server, info, name, read(chosen.folder / f"{name}.json")))]
    text = page(checked, len(names), chosen.version, version)
    print(text)
    if chosen.write:
        PAGE.write_text(text, encoding="utf-8")


def served() -> Server:
    """A private ComfyUI that says what it would refuse."""
    return Server(files={"custom_nodes/validating_node.py": HERE / "validating_node.py"})


def template_names(folder: Path) -> list[str]:
    """All that ComfyUI's own list of templates shows."""
    return sorted({each["name"] for group in read(folder / "index.json") for each in group["templates"]})


def read(file: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(file.read_text(encoding="utf-8"))


def check(server: Server, info: dict[str, Any], name: str, workflow: dict[str, Any]) -> Checked | None:
    """What ComfyUI says to a template without our nodes and with each. None for one that does not sample here."""
    nodes = nodes_of(workflow, info)
    samplers = [number for number, node in nodes.items() if node.samples]
    inside = sum(":" in number for number in samplers)
    if not any(node.models for node in nodes.values()):
        return None
    lacking = sorted({node.kind for node in nodes.values()} - {*info})
    without = refusals(server, info, nodes)
    changed = {kind: sorted({*refusals(server, info, with_ours(nodes, kind, info))} ^ {*without}) for kind in OURS}
    return Checked(name, len(samplers), inside, lacking, without, changed)


def with_ours(nodes: dict[str, Node], kind: str, info: dict[str, Any]) -> dict[str, Node]:
    """The same prompt with one of our nodes at every sampler: before it, or, if it reports, behind it."""
    result = {number: replace(node, inputs=dict(node.inputs)) for number, node in nodes.items()}
    for number, node in nodes.items():
        if kind == REPORT:
            if node.samples:
                _report(result, number, node.gives.index("LATENT"))
            continue
        for name in node.models:
            place, cached = f"refrain:{number}:{name}", kind if kind != SETTINGS else CACHES[0]
            result[place] = ours(cached, info, model=node.inputs[name])
            if kind == SETTINGS:
                result[f"{place}:2"] = ours(SETTINGS, info, model=node.inputs[name], settings=[place, 1])
                place = f"{place}:2"
            result[number].inputs[name] = [place, 0]
    return result


def _report(result: dict[str, Node], number: str, output: int) -> None:
    place = f"refrain:{number}:report"
    for node in result.values():
        node.inputs.update({name: [place, 0] for name, value in node.inputs.items() if value == [number, output]})
    result[place] = Node(REPORT, {"samples": [number, output]})


def ours(kind: str, info: dict[str, Any], **links: Any) -> Node:
    """One of our nodes, as it comes, connected so."""
    return Node(kind, {name: own["default"] for name, _, own in widgets(info[kind])} | links)


def refusals(server: Server, info: dict[str, Any], nodes: dict[str, Node]) -> list[str]:
    """What ComfyUI has against this prompt, but for files that are not on this machine."""
    prompt, stand_ins = {}, {}
    for number, node in nodes.items():
        inputs = node.inputs
        if node.kind not in info:
            inputs = {name: value for name, value in inputs.items() if isinstance(value, list)}
            slots = stand_ins.setdefault(node.kind, {"takes": {}, "gives": node.gives})
            slots["takes"] |= {name: node.takes[name] for name in inputs}
        prompt[number] = {"class_type": node.kind, "inputs": inputs}
    body = json.dumps({"prompt": prompt, "stand_ins": stand_ins}).encode()
    answer = json.loads(server.fetch("/refrain/validate", body))
    told = [
        f"{nodes[number].kind}: {error['message']}: {error['details'][:90]}"
        for number, each in answer["node_errors"].items()
        for error in each["errors"]
        if not is_file(error)
    ]
    if answer["error"] and not answer["node_errors"]:
        told.append(answer["error"]["message"])
    return sorted(told)


def is_file(error: dict[str, Any]) -> bool:
    """Whether ComfyUI misses no more than a model, a picture or a sound."""
    kinds = ("value_not_in_list", "custom_validation_failed")
    return error["type"] in kinds and bool(FILE.search(error["details"]))


def page(checked: list[Checked], count: int, templates: str, comfyui: str) -> str:
    """docs/templates.md."""
    whole = [each for each in checked if not each.lacking]
    accepted = [each for each in checked if not each.refused]
    numbers = {
        "count": count,
        "templates": templates,
        "comfyui": comfyui,
        "here": len(checked),
        "samplers": sum(each.samplers for each in checked),
        "inside": sum(each.inside for each in checked),
        "whole": len(whole),
        "lacking": len(checked) - len(whole),
        "accepted": len(accepted),
        "refused": len(checked) - len(accepted),
    }
    rows = [
        f"| {NAMES[kind]} | {sum(kind in each.accepts for each in accepted)} of {len(accepted)} "
        f"| {sum(kind in each.accepts for each in checked)} of {len(checked)} |"
        for kind in OURS
    ]
    lacking = Counter(kind for each in checked for kind in each.lacking)
    return WORDS.format(
        **numbers,
        rows="\n".join(rows),
        unlike="\n".join(_unlike(checked)) or "None.",
        alike="\n".join(f"- `{each.name}`: {_first(each.refused)}" for each in checked if each.refused),
        kinds=", ".join(f"`{kind}` {number}" for kind, number in sorted(lacking.items())),
    )


def _unlike(checked: list[Checked]) -> list[str]:
    return [
        f"- `{each.name}`, {NAMES[kind]}: {_first(each.changed[kind])}"
        for each in checked
        for kind in OURS
        if each.changed[kind]
    ]


def _first(refused: list[str]) -> str:
    """The first of them, and how many others there are."""
    others = len({*refused}) - 1
    return refused[0].replace("|", "/") + (f", and {others} more" if others else "")


if __name__ == "__main__":
    main()
