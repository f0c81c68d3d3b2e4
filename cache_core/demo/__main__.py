"""`python -m cache_core.demo`: the same pictures uncached, with each cache, and with fewer steps, side by side."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from ..compare.side_by_side import table
from . import PROMPTS
from .methods import methods, sampled
from .server import find_comfyui

SHOWN = PROMPTS[:4]
MEASURED = "Seconds are of all pictures, PSNR and SSIM the median of their closeness to the uncached ones."


def main() -> None:
    """Generate, print the table, write the picture."""
    parser = argparse.ArgumentParser(prog="python -m cache_core.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the pictures")
    parser.add_argument(
        "--through", choices=("diffusers", "comfyui"), help="only one way; default: both where possible"
    )
    chosen = parser.parse_args()
    ways = [chosen.through] if chosen.through else ["diffusers", *(["comfyui"] if find_comfyui() else [])]
    chosen.out.mkdir(parents=True, exist_ok=True)
    for way in ways:
        _demonstrate(way, chosen.out / f"side_by_side_{way}.png")
    if not chosen.through and len(ways) == 1:
        print("No ComfyUI was found. Set COMFYUI_PATH to see the same through its queue.")


def _demonstrate(way: str, picture: Path) -> None:
    from tqdm import tqdm

    from ..compare.layouts import in_rows

    name = {"diffusers": "diffusers", "comfyui": "ComfyUI"}[way]
    sampler = importlib.import_module(f"{__package__}.with_{way}").sampler
    compared, count = methods(), len(SHOWN)
    with (
        sampler() as sample,
        tqdm(total=len(compared) * count, unit="picture", desc=f"Generating through {name}") as bar,
    ):
        runs = sampled(sample, compared, SHOWN, bar.update)
    print(f"\n{count} pictures through {name}\n\n{table(runs)}\n{MEASURED}\n")
    title = f"The same {count} pictures through {name}, with less computed"
    in_rows(runs, SHOWN, title, MEASURED).save(picture)
    print(f"Side by side: {picture}\n")


if __name__ == "__main__":
    main()
