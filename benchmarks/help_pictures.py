"""`python benchmarks/help_pictures.py`: the pictures on help pages, made through ComfyUI's queue."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import video_pictures

from cache_core.compare.quality import psnr
from cache_core.compare.sheet import Cell, Label, draw
from cache_core.demo import PROMPTS
from cache_core.demo.server import Server
from cache_core.demo.still_life import SIZE
from cache_core.demo.workflows import node_id, set_inputs, workflow

HELP = Path(__file__).resolve().parents[1] / "web" / "docs"
SHOWN = PROMPTS[:3]
NEGATIVE_ONLY = {"spatial_attention_block_skip_range": 1}
PAGES = {  # node: (workflow, what its share is of, rows of (name, settings))
    "RefrainFirstBlockCache": (
        "first_block_cache",
        "blocks",
        [
            ("Careful", {"residual_diff_threshold": 0.08}),
            ("Balanced", {"residual_diff_threshold": 0.12}),
            ("Far", {"residual_diff_threshold": 0.8}),
        ],
    ),
    "RefrainTaylorSeerCache": (
        "taylorseer",
        "blocks",
        [
            ("Balanced", {"cache_interval": 2}),
            ("Fast", {"cache_interval": 3}),
            ("Too far", {"cache_interval": 8}),
        ],
    ),
    "RefrainPyramidAttentionBroadcast": (
        "pyramid_attention_broadcast",
        "attention",
        [
            ("Usual", {"spatial_attention_block_skip_range": 2}),
            ("Far", {"spatial_attention_block_skip_range": 4}),
            ("Too far", {"spatial_attention_block_skip_range": 10}),
        ],
    ),
    "RefrainFasterCache": (
        "faster_cache",
        "negative prompts",
        [
            ("Default", {"unconditional_batch_skip_range": 2, **NEGATIVE_ONLY}),
            ("Far", {"unconditional_batch_skip_range": 5, **NEGATIVE_ONLY}),
            ("Too far", {"unconditional_batch_skip_range": 20, **NEGATIVE_ONLY}),
        ],
    ),
}


def main() -> None:
    """Write all of them."""
    with Server() as server:
        uncached = [_picture(server, "uncached", number)[0] for number in range(len(SHOWN))]
        for node, (name, whole, rows) in PAGES.items():
            shown = [[Label("Uncached", "20 steps, cfg 3", "the reference"), *uncached]]
            for title, settings in rows:
                made = [_picture(server, name, number, node, settings) for number in range(len(SHOWN))]
                pictures, reports = zip(*made)
                share = sum(_share(report, whole) for report in reports) / len(reports)
                closeness = median(map(psnr, pictures, uncached))
                setting = "{} {}".format(*next(iter(settings.items())))
                label = Label(title, setting, f"{share:.0%} of {whole} computed, {closeness:.1f} dB")
                shown.append([label, *pictures])
            _save("The same pictures, with less computed", shown, node, "cached")
        _write_comparison(server)
        _write_search(server)
        video_pictures.write(server)
    label = Label("The demo model", f"{SIZE} x {SIZE}, enlarged")
    _save("What it draws", [[label, *uncached]], "RefrainLoadDemo", "pictures")


def _picture(server: Server, name: str, number: int, node: str = "", settings: dict[str, Any] | None = None) -> tuple:
    """Picture (3, size, size) in 0..1 of a prompt, and its report."""
    graph = set_inputs(workflow(name), "KSampler", seed=number)
    graph = set_inputs(graph, "ImageScale", width=SIZE, height=SIZE)  # as it was made
    graph = set_inputs(graph, node, **settings) if settings else graph
    graph[graph[node_id(graph, "KSampler")]["inputs"]["positive"][0]]["inputs"]["text"] = SHOWN[number]
    outputs = server.run(graph)["outputs"]
    (image,) = outputs[node_id(graph, "PreviewImage")]["images"]
    (report,) = outputs[node_id(graph, "RefrainCacheReport")]["refrain_report"] if node else (None,)
    return video_pictures.opened(server, image), report


def _write_comparison(server: Server) -> None:
    """The sheet of the example workflow. Its verdicts are by the clock: make it on a machine that does nothing else."""
    graph = workflow("compare")
    (image,) = server.run(graph)["outputs"][node_id(graph, "RefrainCacheCompare")]["images"]
    (HELP / "RefrainCacheCompare" / "comparison.png").write_bytes(server.picture(image))


def _write_search(server: Server) -> None:
    """The plot of a search on the same model and prompt."""
    graph = workflow("compare")
    node = graph[node_id(graph, "RefrainCacheCompare")]
    inputs = {name: value for name, value in node["inputs"].items() if not name.startswith("cached_")}
    node.update(class_type="RefrainFindSettings", inputs={**inputs, "wish": "hardly", "speedup": 1.5})
    _, plot = server.run(graph)["outputs"][node_id(graph, "RefrainFindSettings")]["images"]
    (HELP / "RefrainFindSettings" / "plot.png").write_bytes(server.picture(plot))


def _share(report: dict[str, Any], whole: str) -> float:
    if whole != "negative prompts":
        return report["totals"]["computed_share"]
    return report["totals"]["branches"]["negative"]["computed"] / report["steps"]


def _save(title: str, rows: list[list[Cell]], node: str, name: str) -> None:
    captions = [None, *(Label(settings=prompt) for prompt in SHOWN)]
    draw(title, [captions, *rows]).save(HELP / node / f"{name}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    main()
