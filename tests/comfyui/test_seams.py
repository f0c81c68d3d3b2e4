"""docs/seams.md says what we take from ComfyUI: it is there, and it is all."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from seams import moved, seams
from test_scanners import PACK, TREES, asked_of_comfy, python_files

GUARD = "from comfy_import_guard.cli import main; raise SystemExit(main())"


@pytest.mark.parametrize("which", TREES)
def test_all_that_the_page_names_is_in_this_comfyui(which):
    if not (TREES[which] / "comfy").is_dir():
        pytest.skip(f"no ComfyUI in {TREES[which]}")
    assert moved(TREES[which], is_oldest=which == "oldest") == []


def test_all_that_the_pack_imports_is_on_the_page():
    page = {(seam.file.removesuffix(".py").replace("/", "."), seam.name.partition("(")[0]) for seam in seams()}
    known = {f"{module}.{name}" for module, name in page}
    own = [name for name in python_files() if name.startswith(("cache_core/adapters/comfyui/", "nodes/"))]
    asked = {
        dotted
        for name in own
        if not name.endswith("/demo.py")  # loads a model as ComfyUI's loaders do
        for dotted, _ in asked_of_comfy(ast.parse((PACK / name).read_text(encoding="utf-8")))
    }
    modules = {module for module, _ in page}
    assert len(asked) > 20
    assert {
        dotted
        for dotted in asked
        if dotted not in modules
        and not any(each == dotted or each.startswith(f"{dotted}.") or dotted.startswith(f"{each}.") for each in known)
    } <= {"comfy"}


@pytest.mark.parametrize(
    "file, before, after, sentence",
    [
        ("comfy/patcher_extension.py", "OUTER_SAMPLE =", "WHOLE_SAMPLE =", "there is no WrappersMP.OUTER_SAMPLE"),
        (
            "comfy/sample.py",
            "def prepare_noise(latent_image, seed",
            "def prepare_noise(latent, seed",
            "takes latent, seed",
        ),
        ("comfy/samplers.py", "cond_or_uncond", "which_branch", 'nothing says "cond_or_uncond"'),
        ("comfy/context_windows.py", ".index_list", ".frames", "nothing has .index_list"),
        ("latent_preview.py", None, None, "there is no such file, so no get_previewer"),
    ],
)
def test_what_was_moved_is_a_sentence(file, before, after, sentence, tmp_path):
    for each in {seam.file for seam in seams()}:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        if (TREES["in use"] / each).is_file():
            shutil.copy(TREES["in use"] / each, tmp_path / each)
    assert moved(tmp_path) == []
    text = (tmp_path / file).read_text(encoding="utf-8")
    if before is None:
        (tmp_path / file).unlink()
    else:
        assert before in text
        (tmp_path / file).write_text(text.replace(before, after), encoding="utf-8")
    (found,) = moved(tmp_path)
    assert sentence in found


def copied(names, source, folder):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return folder


@pytest.fixture(scope="module", params=TREES)
def guard(request, tmp_path_factory):
    """comfy-import-guard on packs: it reads ComfyUI from git, so it gets one made of this ComfyUI's files."""
    tree, place = TREES[request.param], tmp_path_factory.mktemp("guard")
    if find_spec("comfy_import_guard") is None:
        pytest.skip("no comfy-import-guard: run make test-comfyui, which installs it")
    if not (tree / "comfy").is_dir():
        pytest.skip(f"no ComfyUI in {tree}")
    files = [file.relative_to(tree) for part in ("comfy", "comfy_*") for file in tree.glob(f"{part}/**/*.py")]
    clone = copied([*files, *(file.relative_to(tree) for file in tree.glob("*.py"))], tree, place / "ComfyUI")
    named = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*named, "commit", "-q", "-m", "this ComfyUI"]):
        subprocess.run(["git", *command], cwd=clone, check=True)

    def check(packs):
        command = ["check", "--offline", "--strict", "--cache-dir", place, "--comfy-dir", packs, "--target", "HEAD"]
        return subprocess.run([sys.executable, "-c", GUARD, *command], capture_output=True, text=True, timeout=120)

    return check


def test_comfy_import_guard_finds_nothing_that_will_break(guard, tmp_path):
    copied(python_files(), PACK, tmp_path / "custom_nodes" / "refrain")
    done = guard(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 will break, 1 safe, 0 warn, 0 skipped" in done.stdout


def test_comfy_import_guard_sees_a_name_that_is_not_there(guard, tmp_path):
    copied(python_files(), PACK, tmp_path / "custom_nodes" / "refrain")
    (tmp_path / "custom_nodes" / "refrain" / "more.py").write_text("from comfy.samplers import moved\n")
    done = guard(tmp_path)
    assert done.returncode == 1 and "comfy.samplers" in done.stdout and "moved" in done.stdout
