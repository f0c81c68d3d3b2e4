"""What was found on the user's models: `measured.json` in ComfyUI's user folder, and entries that others shared."""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path

from ..cache_core.measured import Identity, Measured, fitting, shared, with_entry
from ..cache_core.measured_text import MOST_BYTES, Newer, as_text, from_text

logger = logging.getLogger(__name__)

PLACE = ("default", "refrain", "measured.json")  # in ComfyUI's user folder: never from a request
SHARED, MOST_SHARED = Path(__file__).resolve().parents[1] / "presets", 200  # files


def keep(entry: Measured) -> None:
    """Add an entry to the user's file, in one stroke. Where that is not possible the log says so in a line."""
    path = _path()
    if path is None:
        return
    draft = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        text = as_text(with_entry(_entries(path, keeps_newer=True), entry)).encode()
        from_text(text)  # nothing is written that would not be read
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(text)
        os.replace(draft, path)
    except (OSError, ValueError) as error:
        logger.warning("Refrain could not keep what it found in %s: %s", path, error)
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def known(model: Identity, wish: str, steps: int = 0) -> Measured | None:
    """What was measured on this model for this wish, by the user or else by others."""
    path = _path()
    own = fitting(_entries(path), model, wish, steps) if path else None
    return own or fitting(_shared(), model, wish, steps)


def stamp() -> str:
    """Changes with the user's file."""
    path = _path()
    try:
        return str(path.stat().st_mtime_ns) if path else ""
    except OSError:
        return ""


def _path() -> Path | None:
    try:
        import folder_paths

        return Path(folder_paths.get_user_directory()).joinpath(*PLACE)
    except (ImportError, AttributeError):  # ComfyUI as a library, or another one
        return None


def _shared() -> tuple[Measured, ...]:
    files = sorted(SHARED.glob("*.json"))[:MOST_SHARED]
    return tuple(entry for file in files for entry in shared(_entries(file)))


def _entries(path: Path, keeps_newer: bool = False) -> tuple[Measured, ...]:
    """A file's entries. One that is damaged, hostile or of a later version counts for nothing, and is told in a line.

    `keeps_newer`: raises Newer, as that file is not to be overwritten.
    """
    try:
        if not path.is_file():
            return ()
        with path.open("rb") as file:
            return from_text(file.read(MOST_BYTES + 1))
    except (OSError, ValueError) as error:
        if keeps_newer and isinstance(error, Newer):
            raise
        logger.warning("Refrain ignores %s: %s", path, error)
        return ()
