"""Cache Report where no cached run made the samples: which node is to blame, in words."""

from __future__ import annotations

import json

import pytest
from test_queue import without_cache

from cache_core.demo.workflows import node_id, set_inputs, workflow

CACHE, PRESET, REPORT = "RefrainFirstBlockCache", "RefrainCachePreset", "RefrainCacheReport"
CONNECT, NO_RUN = "Connect a Refrain cache node", "No cached sampling run made these samples"
PRESET_NODE = {"class_type": PRESET, "inputs": {"model": ["1", 0], "quality": "balanced", "steps": 8}}
APPLY_NODE = {"class_type": "RefrainApplySettings", "inputs": {"model": ["1", 0], "settings": ["2", 1]}}


def summary_of(server, prompt, workflow=None):
    """What the report says of this prompt, queued as by a browser with this workflow open."""
    body = {"prompt": prompt, "client_id": server.client_id}
    if workflow is not None:
        body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
    answer = json.loads(server.fetch("/prompt", json.dumps(body).encode()))
    assert server.follow(answer["prompt_id"])["type"] == "execution_success"
    (report,) = server.history(answer["prompt_id"])["outputs"][node_id(prompt, REPORT)]["refrain_report"]
    return report["summary"]


def bypassed(seed):
    """What the browser sends where the cache is bypassed: the prompt has no such node."""
    return without_cache("first_block_cache", seed=seed)


def node(mode, kind=CACHE, **others):
    return {"id": 2, "type": kind, "mode": mode} | others


SUBGRAPH = {"subgraphs": [{"id": "wrapped", "nodes": [node(0)]}]}
INSIDE = {"subgraphs": [{"id": "wrapped", "nodes": [node(4)]}]}


@pytest.mark.parametrize(
    ("left_out", "title"),
    [
        ({"nodes": [node(4)]}, "Apply First Block Cache"),
        ({"nodes": [node(2, title="my cache")]}, "my cache"),
        ({"nodes": [node(4, PRESET)]}, "Faster Sampling"),
        ({"nodes": [node(4, "RefrainTaylorSeerCache")]}, "Apply TaylorSeer Cache"),
        ({"nodes": [node(4, "wrapped", title="Sampling")], "definitions": SUBGRAPH}, "Sampling"),
        ({"nodes": [node(0, "wrapped")], "definitions": INSIDE}, "Apply First Block Cache"),
    ],
    ids=["bypassed", "muted", "preset", "TaylorSeer", "subgraph", "in a subgraph"],
)
def test_a_bypassed_cache_is_named(server, left_out, title, request):
    seed = 5000 + len(request.node.name)
    assert summary_of(server, bypassed(seed), left_out) == f'{NO_RUN}: "{title}" is bypassed or muted.'


@pytest.mark.parametrize(
    "unclear",
    [
        None,
        {},
        {"nodes": [node(0)]},
        {"nodes": [node(4, "KSampler")]},
        {"nodes": 1, "definitions": [2]},
        {"nodes": [3]},
    ],
    ids=repr,
)
def test_where_no_cache_is_left_out_it_says_what_to_connect(server, unclear):
    assert CONNECT in summary_of(server, bypassed(6000), unclear)


@pytest.mark.parametrize("cache", ["Faster Sampling", "Apply Cache Settings"])
def test_a_cache_node_that_declined_is_not_one_to_connect(server, cache):
    prompt = set_inputs(workflow("first_block_cache"), "KSampler", steps=8, seed=7000)
    prompt["2"] = PRESET_NODE
    if cache == "Apply Cache Settings":
        prompt["30"] = APPLY_NODE
        prompt = set_inputs(prompt, "KSampler", model=["30", 0])

    summary = summary_of(server, prompt, {"nodes": [node(4)]})

    assert summary.startswith(f"{NO_RUN}: {cache} handed the model on without a cache")
    assert CONNECT not in summary


def test_a_cache_that_is_connected_but_saw_no_sampling_is_not_one_to_connect(server):
    """The cached model goes nowhere near these samples: they were never sampled by it."""
    prompt = workflow("first_block_cache")
    report, sampler = (node_id(prompt, kind) for kind in (REPORT, "KSampler"))
    steps_zero = {"end_at_step": 0, "start_at_step": 0, "add_noise": "disable", "return_with_leftover_noise": "disable"}
    given = {name: value for name, value in prompt[sampler]["inputs"].items() if name not in ("seed", "denoise")}
    inputs = given | {"noise_seed": 8000} | steps_zero
    prompt[sampler] = {"class_type": "KSamplerAdvanced", "inputs": inputs}

    summary = summary_of(server, prompt)

    assert CONNECT not in summary and '"Apply First Block Cache" is connected' in summary
    assert prompt[report]["inputs"]["samples"] == [sampler, 0]
