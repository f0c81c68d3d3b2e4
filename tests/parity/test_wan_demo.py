"""The tiny Wan's file is the same model in ComfyUI and in diffusers."""

import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cache_core.compare.quality import psnr
from cache_core.demo import VAE_WEIGHTS, motion, sampling, wan
from cache_core.demo.server import find_comfyui
from training import wan as training

WORKER = Path(__file__).with_name("comfyui_worker.py")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An untrained transformer, with all of its weights off their starting values."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_config(wan.TRANSFORMER_CONFIG)
    weights = {key: weight + 0.05 * torch.randn_like(weight) for key, weight in transformer.state_dict().items()}
    path = tmp_path_factory.mktemp("wan") / "wan.safetensors"
    training.export(weights, path)
    return path


def test_the_file_is_small_enough_to_ship(file):
    assert file.stat().st_size < 16e6


def test_at_the_size_measured_attention_with_its_projections_is_half_of_the_work():
    width, wide, tokens = 256, wan.TRANSFORMER_CONFIG["ffn_dim"], 15 * 6 * 6
    attention = 4 * width**2 + 2 * tokens * width  # multiplications for one token, in one block
    cross_attention = 2 * width**2 + 2 * 8 * width + 2 * width**2 * 8 / tokens
    feed_forward = 2 * width * wide
    assert tokens >= 512
    assert attention / (attention + cross_attention + feed_forward) > 0.5


def test_comfyui_takes_it_for_a_wan_and_predicts_and_decodes_the_same(file, tmp_path):
    comfyui = find_comfyui() or pytest.skip("no ComfyUI: set COMFYUI_PATH and COMFYUI_PYTHON")
    clips = [motion.random_clip(random.Random(seed)) for seed in range(2)]
    clean = wan.encode(motion.render(clips, 3, 64, torch.Generator().manual_seed(0)))
    tokens, pooled = sampling.encode_prompts(list(map(motion.prompt_of, clips)))
    latent, sigmas = torch.lerp(clean, torch.randn_like(clean), 0.6), torch.tensor([0.6, 0.3])

    given = {"latent": latent, "clean": clean, "tokens": tokens, "timestep": sigmas * 1000}
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "given")
    folder, python = comfyui
    command = [python, WORKER, file, VAE_WEIGHTS, tmp_path / "given", tmp_path / "result"]
    subprocess.run(list(map(str, command)), check=True, timeout=120, env=os.environ | {"PYTHONPATH": str(folder)})
    with safe_open(tmp_path / "result", framework="pt") as stored:
        assert stored.metadata()["class"] == "WAN21"
    result = load_file(tmp_path / "result")

    velocity = wan.velocity(wan.transformer_of(load_file(file)), latent, sigmas, tokens, pooled)
    torch.testing.assert_close(result["velocity"], velocity, atol=1e-4, rtol=0)
    assert velocity.std() > 0.5
    pictures = result["pictures"].movedim(-1, 1)  # (clips * frames, 3, 64, 64)
    assert all(psnr(*pair) > 28 for pair in zip(pictures, wan.decode(clean).flatten(0, 1), strict=True))
