"""What the registry gets: comfy-cli's zip of the pack, and the pack as it comes out of that zip."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import zipfile

import pytest
from PIL import Image

from cache_core.demo import server as comfyui
from cache_core.demo.workflows import set_inputs, workflow

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
PACK = comfyui.PACK
COMFY = os.environ.get("COMFY_CLI") or shutil.which("comfy")
PROJECT = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
INSTALLED = ["README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "node_list.json", "__init__.py"]
NEEDED = [
    "nodes",
    "cache_core",
    "web/js",
    "web/docs",
    "locales",
    "example_workflows",
    "examples/api",
    "subgraphs",
    "presets",
]
KEPT_BACK = ("tests/", "benchmarks/", "training/", "docs/", ".", "Makefile", "demo_output/", "build/")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files that git knows, in a repository of their own: comfy-cli writes beside them."""
    if COMFY is None:
        pytest.skip("no comfy-cli: set COMFY_CLI to its `comfy`, or run make test-comfyui")
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PACK, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACK / name, folder / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=folder, check=True)
    return folder


def comfy(checkout, *command):
    """comfy-cli in the checkout, with a home of its own and without a way out of this machine."""
    nowhere = "http://127.0.0.1:9"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HOME": str(checkout.parent / "home"),
        "DO_NOT_TRACK": "1",
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
    }
    return subprocess.run(
        [COMFY, "--skip-prompt", "--no-enable-telemetry", "node", *command],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def packed(checkout):
    done = comfy(checkout, "pack")
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(checkout / "node.zip")


def test_comfy_cli_finds_nothing_to_object_to(checkout):
    done = comfy(checkout, "validate")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "All validation checks passed" in done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()


def test_the_zip_holds_all_that_a_user_needs_and_nothing_else(packed):
    held = packed.namelist()

    assert not [name for name in INSTALLED if name not in held]
    assert not [folder for folder in NEEDED if not any(name.startswith(f"{folder}/") for name in held)]
    assert not [name for name in held if name.startswith(KEPT_BACK)]
    assert not [name for name in held if name.endswith((".pyc", ".zip", ".log")) or "__pycache__" in name]
    tracked = {
        str(path.relative_to(PACK)) for folder in NEEDED for path in (PACK / folder).rglob("*") if path.is_file()
    }
    assert not {name for name in tracked if "__pycache__" not in name} - set(held)


def test_the_pack_from_the_zip_gives_its_nodes_their_help_and_a_cached_picture(packed, tmp_path, server):
    packed.extractall(tmp_path / "refrain")

    with comfyui.Server(pack=tmp_path / "refrain") as unpacked:
        nodes = {name for name, info in unpacked.get("/object_info").items() if info["category"].startswith("Refrain")}
        entry = unpacked.run(workflow("first_block_cache"))

        assert nodes == {
            name for name, info in server.get("/object_info").items() if info["category"].startswith("Refrain")
        }
        assert _counts(entry)["forecast"] > 5
        assert unpacked.fetch("/extensions/refrain/docs/RefrainFirstBlockCache/en.md")
        assert unpacked.get("/workflow_templates")["refrain"] == server.get("/workflow_templates")["refrain"]
        assert unpacked.get("/i18n") == server.get("/i18n")
        assert "IMPORT FAILED" not in unpacked.log


def test_a_server_without_the_web_part_gives_the_same_numbers(packed, tmp_path, server):
    packed.extractall(tmp_path / "refrain")
    shutil.rmtree(tmp_path / "refrain" / "web")
    prompt = set_inputs(workflow("first_block_cache"), "KSampler", seed=77)

    with comfyui.Server(pack=tmp_path / "refrain") as bare:
        counted = [_counts(each.run(prompt)) for each in (bare, server)]

        assert counted[0] == counted[1] and counted[0]["forecast"] > 5
        assert len(bare.get("/refrain/runs")["runs"]) == 1
        assert "IMPORT FAILED" not in bare.log


def _counts(entry):
    (report,) = [shown for output in entry["outputs"].values() for shown in output.get("refrain_report", [])]
    return {name: report["totals"][name] for name in ("calls", "computed", "reused", "forecast")}


def test_the_registry_is_told_what_it_asks_for():
    project, comfy_table = PROJECT["project"], PROJECT["tool"]["comfy"]

    assert "ComfyUI" not in project["name"] and len(project["name"]) < 100
    assert project["license"] == "Apache-2.0"  # a table with a file builds no more from 2027-02-18 on
    assert project["dependencies"] == []
    assert set(project["urls"]) >= {"Repository", "Documentation", "Bug Tracker"}
    assert set(comfy_table) >= {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"}
    assert "web" not in comfy_table  # with WEB_DIRECTORY it would load each script twice


@pytest.mark.parametrize(("key", "name"), [("Icon", "icon"), ("Banner", "banner")])
def test_icon_and_banner_are_files_of_the_repository_in_the_registrys_shapes(key, name):
    address = PROJECT["tool"]["comfy"][key]
    file = PACK / "docs" / "brand" / f"{name}.png"

    assert address.endswith(f"/docs/brand/{name}.png")
    with Image.open(io.BytesIO(file.read_bytes())) as picture:
        width, height = picture.size
    assert width == height <= 400 if name == "icon" else width * 9 == height * 21
    assert (PACK / "docs" / "brand" / f"{name}.svg").is_file()


def test_the_changelog_begins_with_the_version_being_published():
    headings = [
        line for line in (PACK / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line.startswith("## ")
    ]

    assert headings[0].split()[1] == PROJECT["project"]["version"]


def test_the_list_for_older_managers_names_every_node(server):
    """ComfyUI-Manager's scanner finds nodes of schemas only in node_list.json."""
    listed = json.loads((PACK / "node_list.json").read_text(encoding="utf-8"))
    nodes = {name: info for name, info in server.get("/object_info").items() if info["category"].startswith("Refrain")}

    assert listed == {name: nodes[name]["display_name"] for name in sorted(nodes)}
