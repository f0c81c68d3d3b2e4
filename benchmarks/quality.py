"""How close cached pictures stay to uncached ones, what that costs, and what simply taking fewer steps would give.

    python benchmarks/quality.py [--model NAME] [--quick] [--pictures N] [--workers N] [--out FOLDER] [--redraw]

with this project's Python, the extra "benchmark" installed. A trained demo model in a real ComfyUI (COMFYUI_PATH,
COMFYUI_PYTHON; without one, in diffusers), 20 Euler steps, cfg 3, at several flow shifts. Writes quality.md,
quality.json and quality.png, for videos video.md and so on. What the columns mean: docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from quality_results import Result, Results
from quality_rows import UNCACHED
from subjects import SUBJECTS, Pictures

from cache_core.demo.server import find_comfyui

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "docs" / "benchmarks"
SCRATCH = HERE.parent / "build" / "quality"
HEADING = """# Quality of {title}

Made by `benchmarks/quality.py --model {model}`; what the columns mean is in `README.md`. The demo model in {through}:
{pictures} {title}, {steps} Euler steps, cfg {cfg:g}. Uncached, one took {uncached_seconds:.2f} seconds of one
CPU core. All of it took {minutes:.0f} minutes with {workers} processes."""


def main() -> None:
    """Sample, judge, and write the tables, the numbers and the plot."""
    asked = _arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / SUBJECTS[asked.model].file
    if asked.redraw:
        results = Results.read(file.with_suffix(".json"))
    else:
        results = measure(SUBJECTS[asked.model], asked.pictures, asked.workers)
        results.write(file.with_suffix(".json"))
    text = f"{HEADING.format(**results.made)}\n\n{results.tables()}\n"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    from quality_plot import draw

    draw(results, file.with_suffix(".png"))
    print(f"Written: {file.name}.md, .json and .png in {asked.out}")


def measure(subject: Pictures, pictures: int, workers: int) -> Results:
    """Sample with several processes at once, each a part of the work, and judge what they drew."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{part}.pt" for part in range(1, workers + 1)]
        processes = [
            subprocess.Popen(**_sampling(subject, pictures, part, workers, file)) for part, file in enumerate(files, 1)
        ]
        try:
            failed = [process.args for process in processes if process.wait()]
        finally:
            for process in processes:
                process.kill()
        if failed:
            raise SystemExit(f"Sampling failed, see above: {failed[0]}")
        records = [record for file in files for record in torch.load(file, weights_only=True)]
    uncached = [record["seconds"] for record in records if record["method"] == UNCACHED]
    made = {
        "model": subject.name,
        "title": subject.title,
        "through": records[0]["through"],
        "pictures": pictures,
        "steps": subject.steps,
        "cfg": subject.guidance,
        "workers": workers,
        "uncached_seconds": round(sum(uncached) / len(uncached), 4),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    return Results(made, judged(subject, records))


def judged(subject: Pictures, records: Iterable[dict]) -> list[Result]:
    """The records of each row at each shift, against the uncached one of the same seed, in the order of its rows."""
    plain, results = {}, {}
    for record in sorted(records, key=lambda record: record["method"] != UNCACHED):  # uncached first
        whole = plain.setdefault((record["shift"], record["picture"]), record)
        if record["method"] == UNCACHED:
            continue
        key = record["method"], record["setting"], record["shift"]
        result = results.setdefault(key, Result(*key))
        result.blocks.append(record["blocks"] / whole["blocks"])
        result.attentions.append(record["attentions"] / whole["attentions"])
        result.time.append(record["time"])
        result.judge(subject.decode(record["latent"]), subject.decode(whole["latent"]))
    order = {(row.method, row.setting): number for number, row in enumerate(subject.rows())}
    return sorted(results.values(), key=lambda result: (result.shift, order[result.method, result.setting]))


def _sampling(subject: Pictures, pictures: int, part: int, parts: int, file: Path) -> dict:
    """The process that samples one part: its command and environment."""
    found = find_comfyui()
    through, python = ("comfyui", found[1]) if found else ("diffusers", sys.executable)
    options = [f"--model={subject.name}", f"--pictures={pictures}", f"--part={part}", f"--parts={parts}"]
    command = [python, HERE / "quality_sampling.py", through, file, *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # that is for our Python
    return dict(args=[str(word) for word in command], env=environment)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, default="picture", help="which of the demo's models")
    parser.add_argument("--quick", action="store_true", help="2 pictures: to see that it runs")
    parser.add_argument("--pictures", type=int, help="or videos; 16 or 6 unless told")
    parser.add_argument("--workers", type=int, default=2, help="processes at once, of one thread each")
    parser.add_argument("--out", type=Path, help="docs/benchmarks unless told; build/quality with --quick")
    parser.add_argument("--redraw", action="store_true", help="tables and plot from the numbers kept there")
    asked = parser.parse_args()
    asked.pictures = asked.pictures or (2 if asked.quick else SUBJECTS[asked.model].count)
    asked.out = asked.out or (SCRATCH if asked.quick else KEPT)
    return asked


if __name__ == "__main__":
    main()
