"""`python benchmarks/find_settings.py`: what Find Cache Settings promised on the demo, and what fresh seeds gave."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy
from PIL import Image

from cache_core.compare.side_by_side import aligned
from cache_core.demo import PROMPTS
from cache_core.demo.server import Server
from cache_core.demo.workflows import workflow

WISHES = (("can't see it", 1.5), ("hardly", 1.5), ("speed-up", 2.0))
FRESH = (101, 102, 103, 104)  # seeds
HOW = {"steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
LINKED = {"positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0]}
HEADER = ("prompt and wish", "runs", "computed", "promised dB", "fewer steps", "fresh dB", "computed there")


def main() -> None:
    """Print a table: a row for each prompt and wish."""
    with Server() as server:
        rows = [_row(server, text, *wish) for text in PROMPTS[:5] for wish in WISHES]
    print(aligned([HEADER, *rows]))


def _row(server: Server, text: str, wish: str, speedup: float) -> tuple[str, ...]:
    outputs = server.run(_prompt(text, wish, speedup))["outputs"]
    (found,) = outputs["find"]["refrain_found"]
    judged = next((row for row in found["rows"] if row["verdict"]), None)
    runs = f"{len(found['points'])}"
    if judged is None or judged["outcome"] not in ("worth it", "look"):
        return f"{text[:24]}, {wish}", runs, "-", "no cache", "-", "-", "-"
    fresh = [_closeness(server, outputs, seed) for seed in FRESH]
    reports = [outputs[f"report {seed}"]["refrain_report"][0] for seed in FRESH]
    shares = [report["totals"]["computed_share"] for report in reports]
    return (
        f"{text[:24]}, {wish}",
        runs,
        f"{judged['computed_share']:.0%}",
        f"{judged['psnr']:.0f}",
        f"{found['rows'][-1]['steps']}: {found['rows'][-1]['psnr']:.0f}",
        " ".join(f"{decibels:.0f}" for decibels in fresh),
        f"{min(shares):.0%} to {max(shares):.0%}",
    )


def _prompt(text: str, wish: str, speedup: float) -> dict[str, Any]:
    """A search, and of each fresh seed the uncached picture and that with what was found."""
    graph = {number: node for number, node in workflow("compare").items() if number in ("1", "4", "5", "6")}
    graph["4"]["inputs"]["text"] = text
    searched = {"model": ["1", 0], "vae": ["1", 2], "wish": wish, "speedup": speedup, "seed": 1, **HOW, **LINKED}
    graph["find"] = {"class_type": "RefrainFindSettings", "inputs": searched}
    for seed in FRESH:
        for name, model in (("uncached", ["1", 0]), ("cached", ["find", 0])):
            at = f"{name} {seed}"
            graph[at] = {"class_type": "KSampler", "inputs": {"model": model, "seed": seed, **HOW, **LINKED}}
            graph[f"decoded {at}"] = {"class_type": "VAEDecode", "inputs": {"samples": [at, 0], "vae": ["1", 2]}}
            graph[f"shown {at}"] = {"class_type": "PreviewImage", "inputs": {"images": [f"decoded {at}", 0]}}
        graph[f"report {seed}"] = {"class_type": "RefrainCacheReport", "inputs": {"samples": [f"cached {seed}", 0]}}
    return graph


def _closeness(server: Server, outputs: dict[str, Any], seed: int) -> float:
    """In dB, of the pictures' 8 bits."""
    shown = (outputs[f"shown {name} {seed}"]["images"][0] for name in ("uncached", "cached"))
    one, other = (numpy.asarray(Image.open(io.BytesIO(server.picture(each))).convert("RGB"), float) for each in shown)
    error = float(numpy.square((one - other) / 255).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


if __name__ == "__main__":
    main()
