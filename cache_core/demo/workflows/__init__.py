"""The demo's workflows in ComfyUI's API format, and changes to them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The workflows there are."""
    return sorted(file.stem for file in _FOLDER.glob("*.json"))


def workflow(name: str) -> dict[str, Any]:
    """A workflow as a prompt: nodes by id."""
    if name not in names():
        raise ValueError(f"There is no workflow {name!r}. There are: {', '.join(names())}.")
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def node_id(prompt: dict[str, Any], class_type: str) -> str:
    """The id of the only node of this class.

    >>> node_id(workflow("taylorseer"), "KSampler")
    '6'
    """
    found = [number for number, node in prompt.items() if node["class_type"] == class_type]
    if len(found) != 1:
        classes = ", ".join(sorted({node["class_type"] for node in prompt.values()}))
        raise ValueError(f"{len(found)} nodes of the prompt are {class_type}, but 1 is needed. It has: {classes}.")
    return found[0]


def set_inputs(prompt: dict[str, Any], class_type: str, **inputs: Any) -> dict[str, Any]:
    """A copy of the prompt, with other inputs on the only node of this class.

    >>> set_inputs(workflow("taylorseer"), "KSampler", steps=30)["6"]["inputs"]["steps"]
    30
    """
    changed = copy.deepcopy(prompt)
    changed[node_id(prompt, class_type)]["inputs"].update(inputs)
    return changed
