"""Tests inside a real ComfyUI: run with its Python, `python -m pytest tests/comfyui` (see the Makefile)."""

import importlib.util
import os
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
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
    parser.addoption(
        "--write-words", action="store_true", help="write locales/en, node_list.json and web/docs/<node>.md"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; `make test-long` runs it")
    config.addinivalue_line("markers", "slow: a model that can't be made tiny")
    config.addinivalue_line("markers", "xdist_group(name): tests that run in one process, one after the other")


@pytest.hookimpl(trylast=True)  # after pytest's own order
def pytest_collection_modifyitems(items):
    """What is of one architecture of the zoo runs together, and in it what is of one case: each is sampled once."""
    places = {}
    for item in filter(_architecture_of, items):
        of_architecture = places.setdefault(_architecture_of(item), {"": (len(places), 0)})
        of_architecture.setdefault(_case_of(item), (of_architecture[""][0], len(of_architecture)))
    items.sort(key=lambda item: places.get(_architecture_of(item), {}).get(_case_of(item), (-1, 0)))


def _architecture_of(item):
    group = item.get_closest_marker("xdist_group")
    return group and group.args[0]


def _case_of(item):
    """What a fixture beside the specimen is made of, and whether the specimen is another."""
    params = getattr(item, "callspec", SimpleNamespace(params={})).params
    if "specimen_in_half_precision" in params:
        return "half precision"
    return "".join(str(params[name]) for name in ("refined", "replayed", "with_addition") if name in params)


sys.path.insert(0, str(COMFYUI))
_register("cache_core", ROOT / "cache_core")


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI's modules, on the CPU, in this process."""
    sys.path.insert(0, str(COMFYUI))  # pytest puts this repository first, where its folder's name is no Python name
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
def start():
    """Starts a private ComfyUI with this pack, asked over HTTP, for the length of a `with`."""
    from cache_core.demo import server as comfyui

    if comfyui.find_comfyui() is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH and COMFYUI_PYTHON")
    return comfyui.Server


@pytest.fixture(scope="session")
def server(start):
    with start() as running:
        yield running


@pytest.fixture(scope="session")
def oldest():
    """The oldest ComfyUI we support. The environment of the newest runs it."""
    from cache_core.demo import server as comfyui

    folder = Path(os.environ.get("COMFYUI_OLDEST") or Path.home() / "comfy" / "ComfyUI-0.8.0")
    found = comfyui.find_comfyui()
    if found is None or not (folder / "main.py").is_file():
        pytest.skip(f"no ComfyUI 0.8.0 in {folder}: set COMFYUI_OLDEST to its folder")
    with comfyui.Server(folder, found[1]) as running:
        yield running


@pytest.fixture(scope="session")
def demo(comfy):
    """A trained model in this ComfyUI, in float32 or bfloat16, and a way to sample it as the KSampler node does.

    It is the demo as it was before it learned larger pictures: on 64 x 64 pixels a run takes a third of the time.
    """
    import torch

    from cache_core.adapters.comfyui import demo as loading

    loading.FLUX_WEIGHTS = Path(__file__).parent / "weights" / "flux_64.safetensors"
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


@pytest.fixture(scope="session")
def probed(start):
    """A private ComfyUI with this pack and the nodes of probe_nodes.py in it."""
    files = {"custom_nodes/probe_nodes.py": Path(__file__).with_name("probe_nodes.py")}
    with start(environment={"OMP_NUM_THREADS": "1"}, files=files) as running:
        yield running
        assert "in outer_sample" not in running.log and "in apply_model" not in running.log  # nothing failed so late


def closeness(latent, reference):
    """Of the demo's pictures, in decibels, the median."""
    from cache_core.compare.quality import psnr
    from cache_core.demo.codec import FLUX_SCALE, FLUX_SHIFT, decode

    pictures, references = (decode((each - FLUX_SHIFT) * FLUX_SCALE) for each in (latent, reference))
    return median(map(psnr, pictures, references))


class Reports:
    """Reports of the cached runs that ended by themselves: pass `reports.watch` to `with_cache`, then read `all`."""

    def __init__(self):
        self.all = []

    def watch(self, report):
        def ended(latent):
            if report.state == "finished":
                self.all.append(report)

        return SimpleNamespace(called=lambda: None, ended=ended)


@pytest.fixture
def reports():
    return Reports()


@pytest.fixture
def cached(comfy, reports):
    """A MODEL with a cache, which reports."""
    from cache_core.adapters.comfyui import with_cache

    return lambda model, strategy: with_cache(model, strategy, watch=reports.watch)


@pytest.fixture
def witnessed():
    """A clone that checks each model call: what is reused must be what was computed last for that very branch.

    Of the model itself, which our hook on its forward stands in for: its own hooks see what it returns in any case.
    """
    import torch
    from comfy.patcher_extension import WrappersMP

    handles = []

    def witness(model):
        ran, seen, clone = Counter(), SimpleNamespace(kept={}, computed=0, replayed=0, wrong=[]), model.clone()
        turns = Counter()  # of a branch at one sigma: of two areas, the negative prompt is the same entry twice
        network, returned = model.model.diffusion_model, []
        handles.append(network.img_in.register_forward_hook(lambda *_: ran.update(["embedding"])))
        handles.append(network.register_forward_hook(lambda *given: returned.append(given[-1])))

        def watch(executor, x, t, c_concat, c_crossattn, control, options, **conds):
            ran.clear()
            denoised = executor(x, t, c_concat, c_crossattn, control, options, **conds)
            hooks = executor.class_obj.current_patcher.current_hooks
            strengths = [hook.strength for hook in hooks.hooks] if hooks else []
            window = options.get("context_window")
            frames = tuple(window.index_list) if window else None
            output = returned[-1]
            for uuid, row in zip(options["uuids"], output.chunk(len(options["uuids"])), strict=True):
                given = (strengths, control is not None, x.shape[1:])
                turns[t[0].item(), uuid, frames] += 1
                branch = (uuid, frames, turns[t[0].item(), uuid, frames])
                if ran:
                    seen.kept[branch] = (given, row.clone())
                    seen.computed += 1
                    continue
                seen.replayed += 1
                known = seen.kept.get(branch)
                if known is None or known[0] != given or not torch.equal(known[1], row):
                    seen.wrong.append((branch, given))
            returned.clear()
            return denoised

        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "witness", watch)
        return clone, seen

    yield witness
    for handle in handles:
        handle.remove()
