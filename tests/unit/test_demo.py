"""The demo model: its words, weights, sampling, pictures, and how often each method makes them."""

import math
import random
from contextlib import nullcontext

import pytest
import torch

from cache_core.compare.quality import psnr
from cache_core.demo import FLUX_WEIGHTS, LATENT_CODEC, PROMPTS, VAE_WEIGHTS, codec, methods, sampling, scene, words


@pytest.fixture(scope="module")
def transformer():
    pytest.importorskip("diffusers", reason="the demo's transformer runs through diffusers, which a user may not have")
    return sampling.load_transformer()


@pytest.fixture(scope="module")
def scenes():
    generator = random.Random(0)
    return [scene.random_scene(generator) for _ in range(16)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return scene.render(scenes, generator=torch.Generator().manual_seed(0))


def start(count):
    return torch.cat([sampling.noise(seed) for seed in range(count)])


def test_the_weights_are_small_enough_to_ship():
    assert sum(path.stat().st_size for path in (FLUX_WEIGHTS, VAE_WEIGHTS, LATENT_CODEC)) < 25e6


def test_the_same_prompt_is_always_the_same_tokens():
    first, second = words.encode(PROMPTS[0]), words.encode(PROMPTS[0])
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_any_word_has_a_vector_of_its_own():
    tokens = torch.stack([words.encode(word)[0][0] for word in ("red", "dragon", "straße", "猫")])
    own = tokens[:, words.WORD_WIDTH : 2 * words.WORD_WIDTH]
    assert (own.abs() == 1).all()
    assert len(own.unique(dim=0)) == 4


def test_known_words_keep_the_vectors_the_model_was_trained_with():
    tokens, pooled = words.encode("a big red ball")
    assert "".join("+" if bit > 0 else "-" for bit in tokens[0, 32:64]) == "-+-+-+--+----+---++++++++-++-++-"
    assert torch.allclose(pooled, tokens.sum(0) / math.sqrt(8))


@pytest.mark.parametrize("prompt", ["", "   ", "a the of, on!"])
def test_a_prompt_without_words_is_zeros(prompt):
    tokens, pooled = words.encode(prompt)
    assert not tokens.any()
    assert not pooled.any()


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.73, 3.0])
@pytest.mark.parametrize("steps", [1, 8, 20, 30])
def test_sigmas_fall_from_one_to_zero(steps, shift):
    sigmas = sampling.flow_sigmas(steps, shift)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_the_shift_keeps_sigmas_high_for_longer():
    plain, shifted = sampling.flow_sigmas(4), sampling.flow_sigmas(4, shift=3.0)
    assert torch.equal(plain, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_euler_is_exact_on_a_straight_line():
    noise, clean = start(1), torch.ones(1, 16, 8, 8)
    latent = sampling.denoise(lambda latent, sigma: noise - clean, noise, sampling.flow_sigmas(7))
    torch.testing.assert_close(latent, clean)  # 7 float32 additions


def test_each_picture_has_its_own_noise():
    assert torch.equal(sampling.noise(5), sampling.noise(5))
    assert not torch.equal(sampling.noise(5), sampling.noise(6))
    assert sampling.noise(5, size=128).shape == (1, 16, 16, 16)


def test_eight_steps_draw_what_the_prompt_says(transformer):
    predict = sampling.GuidedPrediction(transformer, ["a big red ball at the center on a blue plain background"])
    picture = codec.decode(sampling.denoise(predict, start(1), sampling.flow_sigmas(8)))[0]
    center, corner = picture[:, 28:36, 28:36].mean((1, 2)), picture[:, :8, :8].mean((1, 2))
    assert center[0] > 2 * center[2]
    assert corner[2] > 2 * corner[0]


def test_joined_and_separate_branches_agree(transformer):
    schedule = sampling.flow_sigmas(4)
    joined, separate = (
        sampling.denoise(sampling.GuidedPrediction(transformer, PROMPTS[:2], joined=joined), start(2), schedule)
        for joined in (True, False)
    )
    torch.testing.assert_close(joined, separate, atol=1e-4, rtol=0)  # batches of 4 and of 2 round differently


@pytest.mark.parametrize(
    ("scale", "joined", "expected"),
    [(3.0, True, ["cond_uncond"]), (3.0, False, ["uncond", "cond"]), (1.0, True, ["cond"])],
)
def test_the_context_is_told_which_branches_run(transformer, scale, joined, expected):
    told = []

    def call_context(name):
        told.append(name)
        return nullcontext()

    predict = sampling.GuidedPrediction(transformer, PROMPTS[:1], scale, joined, call_context)
    predict(start(1), 0.5)
    assert told == expected


def test_the_linear_codec_nearly_returns_the_picture(pictures):
    again = codec.decode(codec.encode(pictures))
    assert all(psnr(*pair) > 25 for pair in zip(again, pictures, strict=True))  # 16 numbers for 192 lose detail


def test_the_vae_agrees_with_the_linear_decode(pictures):
    pytest.importorskip("diffusers", reason="the demo's VAE is diffusers' AutoencoderTiny, which a user may not have")
    latents = codec.encode(pictures)
    seen = codec.decode_with_vae(codec.load_vae(), latents)
    assert psnr(seen, codec.decode(latents)) > 28


def test_a_scene_shows_its_colors():
    told = scene.Scene("big", "red", "ball", "bottom", "blue", "plain")
    picture = scene.render([told], generator=torch.Generator().manual_seed(0))[0]
    background, ball = picture[:, :8, :8].mean((1, 2)), picture[:, 40:48, 28:36].mean((1, 2))
    assert background.argmax() == 2
    assert ball.argmax() == 0


def test_a_prompt_tells_the_whole_scene():
    told = scene.Scene("big", "red", "ball", "center", "blue", "striped")
    assert scene.prompt_of(told) == PROMPTS[0]


def test_rendering_is_reproducible(scenes, pictures):
    assert torch.equal(pictures, scene.render(scenes, generator=torch.Generator().manual_seed(0)))


def test_a_method_is_one_run_over_all_prompts_with_the_median_of_what_each_gave(pictures):
    compared = [methods.Method("Uncached", "20 steps"), methods.Method("Fewer steps", "10 steps", steps=10)]
    offsets, asked, made = iter([0.1, 0.01, 0.2]), [], []

    def sample(method, prompt, seed):
        asked.append((prompt, seed))
        offset = next(offsets) if method is compared[1] else 0.0
        return method.sampled(pictures[seed] * (1 - offset), share=0.8, seconds=seed + 1.0)

    uncached, fewer = methods.sampled(sample, compared, PROMPTS[:3], lambda: made.append(None))
    assert asked == [(PROMPTS[0], 3), *((prompt, seed) for seed, prompt in enumerate(PROMPTS[:3]) for _ in compared)]
    assert len(made) == 6
    assert (uncached.seconds, uncached.computed_share, uncached.is_identical) == (6.0, pytest.approx(0.8), True)
    assert (fewer.steps, fewer.computed_share) == (10, pytest.approx(0.4))
    assert torch.equal(uncached.pictures, pictures[:3])
    assert fewer.psnr == psnr(pictures[0] * 0.9, pictures[0])
