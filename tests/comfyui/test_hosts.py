"""ComfyUI as others run it: the pack under another name, or twice, and ComfyUI as a library without a server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote

import pytest

from cache_core.demo import server as comfyui
from cache_core.demo.workflows import workflow

PACK = comfyui.PACK
INSTALLED = ("__init__.py", "pyproject.toml", "nodes", "cache_core", "web", "locales")
LISTED = json.loads((PACK / "node_list.json").read_text(encoding="utf-8"))


@pytest.fixture
def another_copy(tmp_path):
    """The pack once more, as a clone or an installation leaves it."""
    for name in INSTALLED:
        copy = shutil.copytree if (PACK / name).is_dir() else shutil.copyfile
        copy(PACK / name, tmp_path / name)
    return tmp_path


def newest():
    return comfyui.find_comfyui() or pytest.skip("no ComfyUI: set COMFYUI_PATH and COMFYUI_PYTHON")


def oldest():
    folder = Path(os.environ.get("COMFYUI_OLDEST") or Path.home() / "comfy" / "ComfyUI-0.8.0")
    return (folder, newest()[1]) if (folder / "main.py").is_file() else pytest.skip(f"no ComfyUI 0.8.0 in {folder}")


@pytest.mark.parametrize(("version", "name"), [(newest, "a_refrain"), (oldest, "refrain_backup")])
def test_of_two_copies_the_first_works_and_the_later_says_which_folder_to_remove(another_copy, version, name):
    with comfyui.Server(*version(), files={f"custom_nodes/{name}": another_copy}) as server:
        shown = {node for node, info in server.get("/object_info").items() if info["category"].startswith("Refrain")}
        entry = server.run(workflow("taylorseer"))
        scripts = [file for file in server.get("/extensions") if "refrain" in file]

        folders = [str(server.folders / "custom_nodes" / each) for each in ("refrain", name)]
        said = [line for line in server.log.splitlines() if "two copies of Refrain" in line]
        assert len(said) == 1 and "main.py" not in said[0]
        first, later = sorted(folders, key=lambda folder: f"Move {folder} out of custom_nodes" in said[0])
        assert f"has loaded the one in {first}, which works. Move {later} out of custom_nodes" in said[0]
        assert shown == set(LISTED)
        (report,) = [each for output in entry["outputs"].values() for each in output.get("refrain_report", [])]
        assert report["totals"]["forecast"] > 5
        assert len(server.get("/refrain/runs")["runs"]) == 1
        assert scripts and all(file.startswith(f"/extensions/{Path(first).name}/") for file in scripts)


def test_under_any_folder_name_all_of_it_is_there(tmp_path):
    (tmp_path / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")  # in the place where tests have the pack
    name = "ComfyUI-Refrain_0.1-main"
    with comfyui.Server(*newest(), files={"custom_nodes/refrain": tmp_path, f"custom_nodes/{name}": PACK}) as server:
        shown = {node for node, info in server.get("/object_info").items() if info["category"].startswith("Refrain")}
        entry = server.run(workflow("taylorseer"))
        (report,) = [each for output in entry["outputs"].values() for each in output.get("refrain_report", [])]
        scripts = [file for file in server.get("/extensions") if file.startswith(f"/extensions/{quote(name)}/")]
        blueprints = [each for each in server.get("/global_subgraphs").values() if name in each["info"]["node_pack"]]

        assert shown == set(LISTED) and report["totals"]["forecast"] > 5
        assert scripts and all(server.fetch(file) for file in scripts)
        assert len(blueprints) == 2 and len(server.get("/workflow_templates")[name]) > 8
        assert "IMPORT FAILED" not in server.log


def test_in_a_folder_with_a_space_nodes_work_and_the_log_says_why_they_draw_nothing(tmp_path):
    (tmp_path / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")
    files = {"custom_nodes/refrain": tmp_path, "custom_nodes/My Refrain": PACK}
    with comfyui.Server(*newest(), files=files) as server:
        shown = {node for node, info in server.get("/object_info").items() if info["category"].startswith("Refrain")}
        assert shown == set(LISTED)
        scripts = [file for file in server.get("/extensions") if "Refrain" in file]
        with pytest.raises(HTTPError, match="404"):  # if it has them one day, the line can go
            server.fetch(scripts[0])
        assert re.search(r"a space in its name: .*My Refrain\. .*Rename the folder to refrain", server.log)


def test_as_a_library_without_a_server_comfyui_has_all_nodes_and_they_cache():
    folder, python = newest()
    script = Path(__file__).with_name("as_a_library.py")
    done = subprocess.run([python, script, folder, PACK], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert set(found) == {"no_server", "a_server_that_nobody_made", "a_stand_in_for_the_server"}
    for kind, made in found.items():
        assert made["loaded"] is True and made["nodes"] == sorted(LISTED), kind
        assert made["report"]["totals"]["forecast"] >= 4, kind
    assert "AttributeError" in done.stderr  # the stand-in has no routes: said, and no more
