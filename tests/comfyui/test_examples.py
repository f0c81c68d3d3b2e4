"""The workflows in the template browser, their API twins, and the script that queues those."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from cache_core.demo import server as comfyui
from cache_core.demo.workflows import names, workflow

EXAMPLES = sorted((comfyui.PACK / "example_workflows").glob("*.json"))
API = sorted((comfyui.PACK / "examples" / "api").glob("*.json"))
MODELS = json.loads((comfyui.PACK / "examples" / "about" / "models.json").read_text(encoding="utf-8"))
SCRIPT = comfyui.PACK / "examples" / "queue_prompt.py"
NOTES = {"Note", "MarkdownNote"}  # they exist in the frontend only
DEMO = "refrain_demo_"
ABOUT = json.loads((comfyui.PACK / "examples" / "about" / "notes.json").read_text(encoding="utf-8"))
SPEC = importlib.util.spec_from_file_location("make_workflows", comfyui.PACK / "examples" / "make_workflows.py")
making = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(making)
NEWER = making.newer_nodes()


def stem(file):
    return file.stem


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def twin_of(file):
    """The same in API format."""
    if file.stem.startswith(DEMO):
        return workflow(file.stem.removeprefix(DEMO))
    return read(comfyui.PACK / "examples" / "api" / file.name)


@pytest.fixture(params=["server", "oldest"])
def any_server(request):
    return request.getfixturevalue(request.param)


def is_too_old(server, file):
    """Whether the example says that it needs a newer ComfyUI than this one, which it then must tell its readers."""
    since = ABOUT.get(file.stem, {}).get("since", "0.8.0")
    version = server.get("/system_stats")["system"]["comfyui_version"]
    assert since == "0.8.0" or f"ComfyUI {since.removesuffix('.0')}" in ABOUT[file.stem]["text"]
    return tuple(map(int, version.split("."))) < tuple(map(int, since.split(".")))


def has_newer_nodes(file):
    """Whether it has nodes of which only ComfyUI's own help was read."""
    return any(node["type"] in NEWER for node in read(file)["nodes"])


def test_the_newest_comfyui_here_is_new_enough_for_every_example_but_those_of_nodes_that_it_lacks(server):
    assert not NEWER.keys() & server.get("/object_info").keys(), "take them out of newer_nodes.json"
    assert [file for file in EXAMPLES if is_too_old(server, file)] == [
        file for file in EXAMPLES if has_newer_nodes(file)
    ]


@pytest.mark.parametrize("file", EXAMPLES, ids=stem)
def test_an_example_opens_with_nodes_that_exist_and_queues_as_its_api_twin(any_server, file):
    if is_too_old(any_server, file) and not has_newer_nodes(file):
        pytest.skip("it needs a newer ComfyUI")
    nodes = {str(node["id"]): node for node in read(file)["nodes"] if node["type"] not in NOTES}
    links = {link[0]: [str(link[1]), link[2]] for link in read(file)["links"]}
    info = NEWER | any_server.get("/object_info")
    prompt = {
        number: {"class_type": node["type"], "inputs": _queued_inputs(node, links, info[node["type"]])}
        for number, node in nodes.items()
    }

    assert prompt == {
        number: {key: node[key] for key in ("class_type", "inputs")} for number, node in twin_of(file).items()
    }


def _queued_inputs(node, links, info):
    """What the frontend would send for this node: its links, and its widgets' values in the order of its inputs."""
    inputs = {item["name"]: links[item["link"]] for item in node["inputs"] if item["link"] is not None}
    values = iter(node["widgets_values"])
    for name, (kind, *settings) in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
        if name in inputs or (isinstance(kind, str) and kind in ("AUDIO", "MODEL", "LATENT")):
            continue
        try:
            inputs[name] = next(values)
        except StopIteration:  # an optional widget that came with a later ComfyUI keeps its default
            assert name in info["input"].get("optional", {})
            continue
        if settings and settings[0].get("control_after_generate"):
            assert next(values) == "fixed"  # the widget that changes the seed after a run
    assert not list(values)
    return inputs


@pytest.mark.parametrize("file", EXAMPLES, ids=stem)
def test_the_links_of_an_example_fit_its_nodes(server, file):
    """Each link is known at both ends, and joins an output to an input of its type."""
    nodes = {node["id"]: node for node in read(file)["nodes"]}
    info = NEWER | server.get("/object_info")
    for number, source, output, target, slot, kind in read(file)["links"]:
        given, taken = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        expected = {
            **info[nodes[target]["type"]]["input"].get("required", {}),
            **info[nodes[target]["type"]]["input"].get("optional", {}),
        }
        assert number in given["links"] and taken["link"] == number
        assert kind == given["type"] == info[nodes[source]["type"]]["output"][output]
        assert {kind, "*"} & {*expected[taken["name"]][0].split(",")}


def test_there_is_an_example_for_each_demo_workflow_and_each_prompt(server):
    offered = sorted(server.get("/workflow_templates")["refrain"])

    demo = {f"{DEMO}{name}" for name in names() if name != "uncached"}
    assert set(offered) == demo | {file.stem for file in API}
    assert len(API) >= 6


@pytest.mark.parametrize("file", EXAMPLES, ids=stem)
def test_the_template_browser_has_a_thumbnail_for_each(server, file):
    assert server.fetch(f"/api/workflow_templates/refrain/{file.stem}.jpg")[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("file", API, ids=stem)
def test_a_machine_with_the_models_takes_the_prompt(any_server, file):
    """Its files are empty here, so that ComfyUI accepts all names, choices and links, and stops when it loads one."""
    if is_too_old(any_server, file):
        pytest.skip("it needs a newer ComfyUI")
    for model, place in MODELS.items():
        folder = any_server.folders / "models" / place["directory"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / model).touch()
    prompt = read(file)

    with pytest.raises(comfyui.PromptFailed) as failed:
        any_server.run(prompt)

    assert "Loader" in failed.value.event["data"]["node_type"]


@pytest.mark.parametrize("file", API, ids=stem)
def test_each_loader_says_where_its_file_comes_from(file):
    made = read(comfyui.PACK / "example_workflows" / file.name)
    files = {
        value
        for node in read(file).values()
        for value in node["inputs"].values()
        if str(value).endswith(".safetensors")
    }
    told = {model["name"] for node in made["nodes"] for model in node["properties"].get("models", [])}
    (note,) = [node["widgets_values"][0] for node in made["nodes"] if node["type"] == "MarkdownNote"]

    assert files == told
    assert not [model for model in files if f"models/{MODELS[model]['directory']}/`[{model}]" not in note]


@pytest.mark.parametrize("name", making.prompts())
def test_a_workflow_is_what_the_script_makes_of_its_prompt(server, name):
    """But for its looks and for outputs that nodes got since: saved workflows do without."""
    made = making.workflow(read(making.prompts()[name]), NEWER | server.get("/object_info"), MODELS, ABOUT[name])
    kept = read(comfyui.PACK / "example_workflows" / f"{name}.json")

    looks = ("outputs", "pos", "size")
    for workflow_of in (made, kept):
        for node in workflow_of["nodes"]:
            assert all(node.pop(key) is not None for key in looks)
    assert json.loads(json.dumps(made)) == kept, "run examples/make_workflows.py"


def queue_prompt(*arguments):
    return subprocess.run(
        [sys.executable, "-I", SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_the_script_queues_a_prompt_and_prints_what_the_report_says(any_server):
    file = comfyui.PACK / "cache_core" / "demo" / "workflows" / "taylorseer.json"

    done = queue_prompt(file, f"http://127.0.0.1:{any_server.port}")

    assert done.returncode == 0, done.stderr
    assert "model calls" in done.stdout and done.stdout.strip() in any_server.log


def test_the_script_says_what_to_mend(server, tmp_path):
    address = f"http://127.0.0.1:{server.port}"
    wrong = workflow("taylorseer")
    wrong["2"]["inputs"]["cache_interval"] = 0
    (tmp_path / "wrong.json").write_text(json.dumps(wrong), encoding="utf-8")
    cases = {
        "Start it, or give its address": queue_prompt(API[0], "http://127.0.0.1:9"),
        "Export (API)": queue_prompt(EXAMPLES[0], address),
        "cache_interval": queue_prompt(tmp_path / "wrong.json", address),
        "PROMPT.json": queue_prompt(),
    }

    for advice, done in cases.items():
        assert done.returncode == 1
        assert advice in done.stderr and "Traceback" not in done.stderr
