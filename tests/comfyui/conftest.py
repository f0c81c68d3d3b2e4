"""Tests inside a real ComfyUI: run with its Python, `python -m pytest tests/comfyui` (see the Makefile)."""

import importlib.util
import os
import random
import sys
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
    """The demo model in this ComfyUI, and a way to sample it as the KSampler node does."""
    from cache_core.adapters.comfyui import demo as loading

    clip, models = loading.load_clip(), {}

    def model(dtype="float32"):
        if dtype not in models:
            models[dtype] = loading.load_model()
            models[dtype].model.diffusion_model.to(getattr(__import__("torch"), dtype))
            models[dtype].model.manual_cast_dtype = None
            models[dtype].model.diffusion_model.dtype = getattr(__import__("torch"), dtype)
        return models[dtype]

    return SimpleNamespace(model=model, clip=clip, sample=_sampling(comfy, clip), shifted=_shifting(comfy))


def _sampling(comfy, clip):
    import torch

    def conditioning(prompts):
        entries = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0] for prompt in prompts]
        pooled = torch.cat([extra["pooled_output"] for _, extra in entries])
        return [[torch.cat([tokens for tokens, _ in entries]), {**entries[0][1], "pooled_output": pooled}]]

    def sample(
        model, prompts, *, steps=20, cfg=3.0, sampler="euler", scheduler="simple", seed=1, latent=None, **options
    ):
        """One latent for each prompt in one batch, each with its own seed from `seed` on."""
        noise = torch.cat([comfy.sample.prepare_noise(torch.zeros(1, 16, 8, 8), seed + i) for i in range(len(prompts))])
        empty = torch.zeros_like(noise) if latent is None else latent
        positive, negative = conditioning(prompts), conditioning([""])
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            positive,
            negative,
            empty,
            seed=seed,
            disable_pbar=True,
            **options,
        )

    sample.conditioning = conditioning
    return sample


def _shifting(comfy):
    def shifted(model, shift):
        """The model with stock ModelSamplingAuraFlow's schedule shift; its multiplier 1 is this model's."""
        if shift == 1:
            return model

        class Shifted(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
            pass

        patched, sampling = model.clone(), Shifted(model.model.model_config)
        sampling.set_parameters(shift=shift, multiplier=1.0)
        patched.add_object_patch("model_sampling", sampling)
        return patched

    return shifted


@pytest.fixture(scope="session")
def scenes():
    """Prompts the demo model was trained to draw, the same every time."""
    from cache_core.demo.scene import prompt_of, random_scene

    generator = random.Random(0)
    return [prompt_of(random_scene(generator)) for _ in range(16)]


@pytest.fixture
def reports():
    """Reports of cached runs, filled by passing `reports.append_to` as `on_report`."""
    collected = []
    return SimpleNamespace(all=collected, add=lambda report, latent: collected.append(report))
