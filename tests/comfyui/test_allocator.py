"""Memory that runs out at any one tensor that a cache makes, in ComfyUI's own sampling, ends no run."""

from dataclasses import replace

import pytest
from failing_allocator import STEPS, check_every_failure, name_of
from zoo import flux
from zoo.cases import EVERY


@pytest.fixture(scope="module")
def tiny(comfy):
    """A Flux of one block of each kind on four tokens, and a way to sample it: runs are short, as there are many."""
    whole = next(each for each in EVERY if each.config == "Flux")
    unet = flux.FLUX | dict(depth=1, depth_single_blocks=1)
    architecture = replace(whole, unet=unet, latent=(1, 16, 4, 4))
    (positive, negative), noise, start = architecture.prompts(), architecture.noise(), architecture.start(0.5)

    def sample(model, steps):
        return comfy.sample.sample(
            model, noise, steps, 3.0, "euler", "simple", positive, negative, start, denoise=0.5, seed=0,
            disable_pbar=True,
        )  # fmt: skip

    return architecture.build(), sample


@pytest.mark.parametrize("strategy", STEPS, ids=name_of)
def test_memory_that_runs_out_at_any_tensor_of_the_cache_ends_no_run(tiny, cached, reports, monkeypatch, strategy):
    (model, sample), steps = tiny, STEPS[strategy]

    def run():
        latent = sample(cached(model, strategy), steps)
        return latent, reports.all.pop()

    check_every_failure(run, sample(model, steps), monkeypatch)
