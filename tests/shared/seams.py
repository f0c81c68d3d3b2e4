"""Compares docs/seams.md, what we take from ComfyUI, with a ComfyUI's files: `python tests/shared/seams.py TREE`.

Files are read, never run, so any ComfyUI can be looked at, whatever it needs.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "seams.md"
ROW = re.compile(r"^\| (\S+\.py) \| `(.+?)` \| (.+?)(?: \| .+)? \| (both|later) \|$", re.MULTILINE)


class Seam(NamedTuple):
    """One row of the page."""

    file: str
    name: str
    what_for: str
    seen_in: str  # both, or later: not in the oldest that we support


def seams() -> list[Seam]:
    """All rows of the page."""
    return [Seam(*row) for row in ROW.findall(PAGE.read_text(encoding="utf-8"))]


def moved(tree: Path, is_oldest: bool = False) -> list[str]:
    """A sentence for each seam that this ComfyUI does not have as the page says."""
    asked = [seam for seam in seams() if seam.seen_in == "both" or not is_oldest]
    return [f"{seam.file}: {why} ({seam.what_for})" for seam in asked if (why := _why_not(tree, seam))]


def _why_not(tree: Path, seam: Seam) -> str | None:
    if not (tree / seam.file).is_file():
        return f"there is no such file, so no {seam.name}"
    text, name = (tree / seam.file).read_text(encoding="utf-8"), seam.name
    if name.startswith('"'):
        return None if name in text or name.replace('"', "'") in text else f"nothing says {name}"
    found = _parsed(text)
    if name.startswith("."):
        return None if name[1:] in found.attributes else f"nothing has {name}"
    dotted, _, parameters = name.partition("(")
    if dotted not in found.names:
        return f"there is no {dotted}"
    wanted, given = re.findall(r"\w+", parameters), found.names[dotted]
    return f"{dotted} takes {', '.join(given)}" if given[: len(wanted)] != wanted else None


class _Found(NamedTuple):
    names: dict[str, list[str]]  # and members; of functions their parameters
    attributes: set[str]


@cache
def _parsed(text: str) -> _Found:
    tree = ast.parse(text)
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    attributes |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return _Found(dict(members(tree.body)), attributes)


def members(body: list[ast.stmt], within: str = "") -> Iterator[tuple[str, list[str]]]:
    """The names that statements bind, those inside if, try and with too; `Class.member`; a function has parameters."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield within + node.name, [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
        elif isinstance(node, ast.ClassDef):
            yield within + node.name, []
            yield from members(node.body, f"{within}{node.name}.")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((within + (alias.asname or alias.name.split(".")[0]), []) for alias in node.names)
        else:
            bound = [*getattr(node, "targets", ()), getattr(node, "target", None)]
            bound += [item.optional_vars for item in getattr(node, "items", ())]
            names = (each for target in bound if target for each in ast.walk(target) if isinstance(each, ast.Name))
            yield from ((within + each.id, []) for each in names)
            for inner in ("body", "orelse", "finalbody", "handlers"):
                yield from members(getattr(node, inner, []), within)


if __name__ == "__main__":
    sentences = moved(Path(sys.argv[1]))
    print("\n".join(sentences) or f"All {len(seams())} are there.")
    sys.exit(bool(sentences))
