"""`find_settings` on a pipeline: the demo's model, sampled as diffusers' pipelines do."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import diffusers

from cache_core.adapters.diffusers import apply, cache_context, find_settings
from cache_core.demo import codec, sampling
from cache_core.strategies.taylorseer import TaylorSeerCache

STEPS = 14


class Pipe:
    """What `find_settings` needs of a pipeline."""

    def __init__(self):
        self.transformer, self.vae = sampling.load_transformer(), codec.load_vae()
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        self.runs, self.fails_at = [], None

    def __call__(self, prompt, num_inference_steps, generator, output_type, return_dict):
        assert (output_type, return_dict) == ("pt", False)
        self.runs.append((num_inference_steps, generator.initial_seed()))
        if len(self.runs) == self.fails_at:
            raise KeyboardInterrupt
        noise = torch.randn(1, sampling.LATENT_CHANNELS, 8, 8, generator=generator)
        sigmas = sampling.flow_sigmas(num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
        context = partial(cache_context, self.transformer)
        predict = sampling.GuidedPrediction(self.transformer, [prompt], call_context=context)
        return (codec.decode_with_vae(self.vae, sampling.denoise(predict, noise, sigmas)),)


@pytest.fixture(scope="module")
def pipe():
    return Pipe()


def test_a_wish_is_searched_in_at_most_twelve_runs_and_judged_on_the_next_seed(pipe):
    pipe.runs.clear()
    found = find_settings(pipe, "hardly", steps=STEPS, seed=3, prompt="a big red ball at the center")
    assert len(pipe.runs) == len(found.points) <= 12
    assert pipe.runs[0] == (STEPS, 3) and {seed for _, seed in pipe.runs[-3:]} == {4}
    assert sum(point.saves_steps for point in found.points) >= 3  # caches did reuse
    assert found.judged.share < 1 and 20 < found.judged.decibels < 90
    assert "on a seed it did not search on" in found.told


def test_a_cancel_leaves_nothing_on_the_pipeline(pipe):
    pipe.runs.clear()
    pipe.fails_at = 4
    with pytest.raises(KeyboardInterrupt):
        find_settings(pipe, steps=STEPS, prompt="a big red ball")
    pipe.fails_at = None
    apply(pipe.transformer, TaylorSeerCache()).remove()  # refused where a cache is on


def test_pipelines_without_a_transformer_and_with_two_are_refused(pipe):
    with pytest.raises(ValueError, match="no transformer"):
        find_settings(SimpleNamespace(unet=pipe.transformer))
    with pytest.raises(ValueError, match="two transformers"):
        find_settings(SimpleNamespace(transformer=pipe.transformer, transformer_2=pipe.transformer))
