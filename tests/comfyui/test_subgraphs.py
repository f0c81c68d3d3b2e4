"""The blueprints in ComfyUI's node library: served, as the script makes them, and cached when they are run."""

from __future__ import annotations

import importlib.util
import json

import pytest
from template_prompts import nodes_of

from cache_core.demo.server import PACK

ABOUT = json.loads((PACK / "examples" / "about" / "subgraphs.json").read_text(encoding="utf-8"))
SAMPLE, COMPARE = ABOUT
SHOWN = {SAMPLE: "refrain_report", COMPARE: "refrain_comparison"}
LOADER, POSITIVE, NEGATIVE, LATENT = range(11, 15)
GIVEN = {  # what the demo gives to an input: node, output
    "model": (LOADER, 0),
    "vae": (LOADER, 2),
    "positive": (POSITIVE, 0),
    "negative": (NEGATIVE, 0),
    "latent_image": (LATENT, 0),
}


@pytest.fixture(params=["server", "oldest"])
def any_server(request):
    return request.getfixturevalue(request.param)


def served(server):
    """Our blueprints by name, as this ComfyUI gives them to the page."""
    ours = {number: entry for number, entry in server.get("/global_subgraphs").items() if "refrain" in str(entry)}
    assert {entry["info"]["node_pack"] for entry in ours.values()} == {"custom_nodes.refrain"}
    return {
        entry["name"]: json.loads(server.get(f"/global_subgraphs/{number}")["data"]) for number, entry in ours.items()
    }


def node(number, kind, values=(), gives=(), **takes):
    inputs = [{"name": name, "type": "*", "link": link} for name, link in takes.items()]
    outputs = [{"name": of, "type": of} for of in gives]
    return {"id": number, "type": kind, "inputs": inputs, "outputs": outputs, "widgets_values": list(values)}


def with_demo(blueprint, **values):
    """A workflow of the demo in which a blueprint samples, with these values typed in on it."""
    own = json.loads(json.dumps(blueprint["nodes"][0])) | {"widgets_values_named": values}
    links = [[1, LOADER, 1, POSITIVE, 0, "CLIP"], [2, LOADER, 1, NEGATIVE, 0, "CLIP"]]
    for at, slot in enumerate(own["inputs"]):
        if "widget" not in slot:
            slot["link"] = len(links) + 1
            links.append([slot["link"], *GIVEN[slot["name"]], own["id"], at, slot["type"]])
    nodes = [
        node(LOADER, "RefrainLoadDemo", gives=["MODEL", "CLIP", "VAE"]),
        node(POSITIVE, "CLIPTextEncode", ["a big red ball at the center"], ["CONDITIONING"], clip=1),
        node(NEGATIVE, "CLIPTextEncode", [""], ["CONDITIONING"], clip=2),
        node(LATENT, "EmptySD3LatentImage", [64, 64, 1], ["LATENT"]),
        own,
    ]
    return {"nodes": nodes, "links": links, "definitions": blueprint["definitions"]}


def ran(server, blueprint, **values):
    """What its nodes show after a run."""
    nodes = nodes_of(with_demo(blueprint, **values), server.get("/object_info"))
    entry = server.run({number: {"class_type": each.kind, "inputs": each.inputs} for number, each in nodes.items()})
    return {name: shown for output in entry["outputs"].values() for name, shown in output.items()}


def test_comfyui_serves_them(any_server):
    assert set(served(any_server)) == set(ABOUT) == {file.stem for file in (PACK / "subgraphs").iterdir()}


def test_sampling_by_a_blueprint_reuses_and_reports(any_server):
    (report,) = ran(any_server, served(any_server)[SAMPLE], seed=3, steps=24, cfg=3.0)["refrain_report"]
    totals = report["totals"]
    assert (report["steps"], totals["calls"]) == (24, 24)
    assert totals["reused"] + totals["forecast"] > 5


def test_comparing_by_a_blueprint_says_whether_the_cache_is_worth_it(any_server):
    shown = ran(any_server, served(any_server)[COMPARE], seed=3, steps=12, cfg=3.0)
    (comparison,) = shown["refrain_comparison"]
    assert len(comparison["rows"]) == 3


@pytest.mark.parametrize("name", ABOUT)
def test_a_blueprint_is_what_the_script_makes_of_its_prompt(server, name, monkeypatch):
    monkeypatch.syspath_prepend(PACK / "examples")
    spec = importlib.util.spec_from_file_location("make_subgraphs", PACK / "examples" / "make_subgraphs.py")
    making = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(making)

    made = making.text(making.blueprint(name, ABOUT[name], server.get("/object_info")))

    assert (PACK / "subgraphs" / f"{name}.json").read_text(encoding="ascii") == made, "run examples/make_subgraphs.py"
