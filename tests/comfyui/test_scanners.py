"""Programs that read packs without running them: what they find in a checkout of ours is so, tests and all."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from seams import members

from cache_core.demo import server as comfyui

PACK = comfyui.PACK
TREES = {
    "in use": Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI"),
    "oldest": Path(os.environ.get("COMFYUI_OLDEST") or Path.home() / "comfy" / "ComfyUI-0.8.0"),
}
LISTS_OF_NODES = r"_CLASS_MAPPINGS"


def python_files():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.py"], cwd=PACK, capture_output=True, check=True
    ).stdout.decode()
    return [name for name in listed.split("\0") if name and (PACK / name).is_file()]


def nodes_written_out(text):
    """The names in literal lists of nodes, as ComfyUI-Manager and public lists read them, at whatever place."""
    literals = re.findall(LISTS_OF_NODES + r"\s*(?::[^=\n]*)?=\s*\{(.*?)\}", text, re.DOTALL)
    literals += re.findall(LISTS_OF_NODES + r"\.update\(\s*\{(.*?)\}", text, re.DOTALL)
    names = [name for literal in literals for _, name in re.findall(r"(['\"])(.*?)\1\s*:", literal)]
    names += re.findall(LISTS_OF_NODES + r"\[['\"](.*?)['\"]\]", text)
    return [*names, *re.findall(r"node_id\s*=\s*['\"](.*?)['\"]", text)]


def test_lists_of_all_nodes_find_ours_and_no_others():
    listed = set(json.loads((PACK / "node_list.json").read_text(encoding="utf-8")))
    found = {name: nodes_written_out((PACK / name).read_text(encoding="utf-8")) for name in python_files()}
    assert {name: nodes for name, nodes in found.items() if not set(nodes) <= listed} == {}
    written = "NODE" + LISTS_OF_NODES + " = {\n \"A\": A, 'B': B}\nX" + LISTS_OF_NODES + '["C"] = C'
    assert nodes_written_out(written) == ["A", "B", "C"]


class Tree:
    """ComfyUI's files, read only: which names a module has at its top level."""

    def __init__(self, folder):
        self.folder = folder
        self.names = cache(self._names)

    def _names(self, module):
        """None where there is no such module."""
        place = self.folder.joinpath(*module.split("."))
        file = next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)
        if file is None:
            return set() if place.is_dir() else None
        return {name for name, _ in members(ast.parse(file.read_text(encoding="utf-8")).body)}

    def has(self, dotted):
        """Whether a dotted name begins with a module and, if it goes on, with a name in it."""
        parts = dotted.split(".")
        deepest = max(
            (end for end in range(1, len(parts) + 1) if self.names(".".join(parts[:end])) is not None), default=0
        )
        return deepest == len(parts) or (deepest and parts[deepest] in self.names(".".join(parts[:deepest])))


def asked_of_comfy(tree):
    """The dotted names below `comfy` that a file imports or reads, and their lines. A name means one thing."""
    local, asked = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in (alias for alias in node.names if alias.name.split(".")[0] == "comfy"):
                local[alias.asname or "comfy"] = alias.name if alias.asname else "comfy"
                asked.append((alias.name, node.lineno))
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "comfy":
            local |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            asked += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    for node in ast.walk(tree):
        at, names = node, []
        while isinstance(at, ast.Attribute):
            at, names = at.value, [at.attr, *names]
        if names and isinstance(at, ast.Name) and at.id in local:
            asked.append((".".join([local[at.id], *names]), node.lineno))
    return asked


@pytest.mark.parametrize("which", TREES)
def test_all_that_a_checkout_asks_of_comfyui_is_there(which):
    """Also what is guarded: programs that warn of packs that will break do not see every guard."""
    if not (TREES[which] / "comfy").is_dir():
        pytest.skip(f"no ComfyUI in {TREES[which]}")
    comfy, missing, count = Tree(TREES[which]), [], 0
    for name in python_files():
        for dotted, line in asked_of_comfy(ast.parse((PACK / name).read_text(encoding="utf-8"))):
            count += 1
            if not comfy.has(dotted):
                missing.append(f"{name}:{line}: {dotted}")
    assert missing == []
    assert count > 150
