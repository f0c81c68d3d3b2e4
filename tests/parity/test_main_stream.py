"""Which stream First Block Cache measures: the picture's, also where the text is longer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from models import CHROMA, COGVIEW4, FLUX, FLUX2, HUNYUAN_VIDEO, QWEN_IMAGE, SD3, TEXT_WIDTH, made
from recording import executions

from cache_core.adapters.diffusers import apply, cache_context
from cache_core.strategies.first_block import FirstBlockCache

PICTURE_TOKENS = {"Flux": 36, "Chroma": 36, "Flux2": 36, "HunyuanVideo": 32, "SD3": 16, "QwenImage": 36, "CogView4": 16}


def _chroma(latent, text, timestep):
    inputs = FLUX.inputs(latent, text, timestep)
    return {name: value for name, value in inputs.items() if name not in ("pooled_projections", "guidance")}


DENOISERS = [FLUX, replace(CHROMA, inputs=_chroma), FLUX2, HUNYUAN_VIDEO, SD3, QWEN_IMAGE, COGVIEW4]


@dataclass(frozen=True)
class Measuring(FirstBlockCache):
    """First Block Cache that notes how many tokens it measures."""

    tokens: list[int] = field(default_factory=list, hash=False, compare=False)

    def _is_as_expected(self, call, tested, state):
        self.tokens.append(tested[0].shape[1])
        return super()._is_as_expected(call, tested, state)


def sampled(denoiser, text_tokens, order=lambda inputs: inputs):
    """The strategy that measured, the report, and which blocks ran, of some steps on a slowly moving latent."""
    model, random = made(denoiser), torch.Generator().manual_seed(1)
    strategy = Measuring(residual_diff_threshold=1.0)
    text = torch.randn(1, text_tokens, TEXT_WIDTH, generator=random)
    latent = torch.randn(denoiser.latent, generator=random)
    with executions(model) as ran, apply(model, strategy) as handle:
        for timestep in torch.linspace(900, 500, 6):
            with cache_context(model, "cond"):
                model(**order(denoiser.inputs(latent, text, timestep.reshape(1))))
            latent = latent * 0.98
    return strategy, handle.report, ran


@pytest.mark.parametrize("denoiser", DENOISERS, ids=lambda denoiser: denoiser.name)
def test_the_picture_is_measured_where_the_text_is_longer(denoiser):
    picture = PICTURE_TOKENS[denoiser.name]
    _, shorter, _ = sampled(denoiser, text_tokens=6)
    strategy, report, _ = sampled(denoiser, text_tokens=picture + 12)
    assert set(strategy.tokens) == {picture}
    assert report.blocks == shorter.blocks and "does not see the latent" not in " ".join(report.notes)
    assert report.count("reused", "forecast") >= 2


@pytest.mark.parametrize("first", ["timestep", "encoder_hidden_states"])
@pytest.mark.parametrize("denoiser", [FLUX, SD3, QWEN_IMAGE], ids=lambda denoiser: denoiser.name)
def test_the_latent_is_known_by_its_name(denoiser, first):
    as_listed, expected, ran = sampled(denoiser, text_tokens=6)
    strategy, report, ran_too = sampled(denoiser, 6, lambda inputs: {first: inputs[first]} | inputs)
    assert report.blocks == expected.blocks and report.notes == expected.notes
    assert strategy.tokens == as_listed.tokens and ran_too == ran
    assert report.count("reused", "forecast") >= 2
