"""`python -m cache_core.demo`: the same pictures uncached, with each cache, and with fewer steps, side by side."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from . import PROMPTS
from .comparison import side_by_side, table
from .methods import methods
from .server import find_comfyui


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

    name = {"diffusers": "diffusers", "comfyui": "ComfyUI"}[way]
    rows_through = importlib.import_module(f"{__package__}.with_{way}").rows
    compared = methods()
    with tqdm(total=len(compared) * len(PROMPTS), unit="picture", desc=f"Generating through {name}") as bar:
        rows = rows_through(compared, PROMPTS, bar.update)
    print(f"\n{len(PROMPTS)} pictures through {name}\n\n{table(rows)}\n")
    side_by_side(rows, PROMPTS, picture, title=f"The same {len(PROMPTS)} pictures through {name}, with less computed")
    print(f"Side by side: {picture}\n")


if __name__ == "__main__":
    main()
