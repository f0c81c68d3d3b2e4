"""Tests inside a real ComfyUI: run with its Python, `python -m pytest tests/comfyui` (see the Makefile)."""

import importlib.util
import os
import random
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")


def _register(name: str, folder: Path) -> None:
    """Make one package importable; the repository itself must stay off sys.path: its `nodes` would hide ComfyUI's."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def pytest_addoption(parser):
    parser.addoption("--write-models", action="store_true", help="write docs/models.md from what the zoo run measured")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a model that can't be made tiny")
    config.addinivalue_line("markers", "xdist_group(name): tests that run in one process, one after the other")


sys.path.insert(0, str(COMFYUI))
_register("cache_core", ROOT / "cache_core")


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI's modules, on the CPU, in this process."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import torch

    torch.set_grad_enabled(False)
    import comfy.model_management
    import comfy.model_sampling
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy.utils

    return comfy


@pytest.fixture(scope="session")
def demo(comfy):
    """The demo model in this ComfyUI, in float32 or bfloat16, and a way to sample it as the KSampler node does."""
    import torch

    from cache_core.adapters.comfyui import demo as loading

    clip, models = loading.load_clip(), {}

    def model(dtype="float32"):
        if dtype not in models:
            models[dtype] = loading.load_model()
            models[dtype].model.diffusion_model.to(getattr(torch, dtype))
            models[dtype].model.diffusion_model.dtype = getattr(torch, dtype)
            models[dtype].model.manual_cast_dtype = None
        return models[dtype]

    return SimpleNamespace(model=model, sample=partial(_sample, loading.sample, clip), shifted=loading.shifted)


def _sample(sample, clip, model, prompts, **settings):
    return sample(model, clip, prompts, **settings)


@pytest.fixture(scope="session")
def scenes():
    """The first so many of the prompts that the demo model was trained to draw, the same every time."""
    from cache_core.demo.scene import prompt_of, random_scene

    def first(count):
        generator = random.Random(0)
        return [prompt_of(random_scene(generator)) for _ in range(count)]

    return first


@pytest.fixture
def reports():
    """Reports of cached runs: pass `reports.add` as `on_report`, then read `reports.all`."""
    collected = []
    return SimpleNamespace(all=collected, add=lambda report, latent: collected.append(report))
