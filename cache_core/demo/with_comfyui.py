"""The demo through ComfyUI: a private headless server, the example workflows posted to its queue."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from ..compare.side_by_side import Sampled
from ..strategies.first_block import FirstBlockCache
from ..strategies.taylorseer import TaylorSeerCache
from ..strategy.strategy import Strategy
from .methods import GUIDANCE, Method, Sample
from .server import PromptFailed, Server
from .still_life import SIZE
from .workflows import node_id, set_inputs, workflow

WORKFLOWS = {FirstBlockCache: "first_block_cache", TaylorSeerCache: "taylorseer"}


@contextmanager
def sampler() -> Iterator[Sample]:
    """Makes the demo's pictures, inside a `with`."""
    with Server() as server:
        yield partial(_sampled, server)


def _sampled(server: Server, method: Method, prompt: str, seed: int) -> Sampled:
    """The seconds are those in the sampler's node."""
    graph = _graph(method, prompt, seed)
    entry, seconds = _timed(server, graph, node_id(graph, "KSampler"))
    (image,) = entry["outputs"][node_id(graph, "PreviewImage")]["images"]
    share = 1.0
    if method.strategy is not None:
        (report,) = entry["outputs"][node_id(graph, "RefrainCacheReport")]["refrain_report"]
        share = report["totals"]["computed_share"]
    return method.sampled(_decoded(server.picture(image)), share, seconds)


def _graph(method: Method, prompt: str, seed: int) -> dict[str, Any]:
    graph = workflow(WORKFLOWS[type(method.strategy)] if method.strategy else "uncached")
    graph = set_inputs(graph, "KSampler", steps=method.steps, cfg=GUIDANCE, seed=seed)
    graph = set_inputs(graph, "ImageScale", width=SIZE, height=SIZE)  # as it was made, to be measured
    positive = graph[node_id(graph, "KSampler")]["inputs"]["positive"][0]
    graph[positive]["inputs"]["text"] = prompt
    if method.strategy is not None:
        graph = set_inputs(graph, f"Refrain{type(method.strategy).__name__}", **_inputs(method.strategy))
    return graph


def _inputs(strategy: Strategy) -> dict[str, Any]:
    return {field.name: getattr(strategy, field.name) for field in fields(strategy) if field.metadata.get("shown")}


def _timed(server: Server, graph: dict[str, Any], sampler: str) -> tuple[dict[str, Any], float]:
    """The prompt's history, and how long its sampler node ran."""
    entered: list[tuple[str | None, float]] = []

    def note(event: dict[str, Any]) -> None:
        if event["type"] == "executing":
            entered.append((event["data"]["node"], time.perf_counter()))

    prompt_id = server.queue(graph)
    last = server.follow(prompt_id, note)
    if last["type"] != "execution_success":
        raise PromptFailed(last)
    began = next(moment for node, moment in entered if node == sampler)
    ended = min(moment for node, moment in entered if moment > began)
    return server.history(prompt_id), ended - began


def _decoded(file: bytes) -> torch.Tensor:
    import numpy
    from PIL import Image

    pixels = numpy.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=numpy.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)
