"""Which strategy and settings for which family of models, and where they come from. docs/presets.md shows the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from .compare.found import CLOSENESS
from .compare.side_by_side import described
from .measured import Measured
from .strategies.first_block import FirstBlockCache
from .strategies.taylorseer import TaylorSeerCache
from .strategy.few_steps import COMPUTE_ALL, MOST_FEW
from .strategy.setting import counted
from .strategy.strategy import Strategy

QUALITIES = VISUALLY_IDENTICAL, BALANCED, FAST = ("visually identical", "balanced", "fast")
WISH_FOR = dict(zip(QUALITIES, CLOSENESS, strict=True))  # what a search calls as much
TOO_FEW_STEPS = MOST_FEW  # First Block Cache at 0.12 computes them all, forecasts are no closer than fewer steps
DEMO, VIDEO_DEMO = "Refrain demo", "Refrain video demo"
UNET, OTHER = "U-Net (SD 1.5, SDXL)", "any other"
NOTHING_TO_REUSE = (
    "With {steps} there is nothing to reuse, so the model is unchanged. Up to {most} steps each goes so far that "
    "First Block Cache computes them all, and forecasts are no closer than fewer steps (measured on the demo model at "
    "flow shift 3, also distilled to few steps). Others report gains for drafts only."
)
UNPUBLISHED = ("HunyuanVideo 1.5", "HiDream", "ACE-Step", "Anima", "Kandinsky 5", "Chroma")  # they get "any other"
SHOWN = "Compare Cache Settings shows what it does to your pictures."
FROM_RUN = f"In runs of up to {TOO_FEW_STEPS} steps everything is computed."
TOLD = "This is for the {} of the input steps; 0 takes them from the run."


@dataclass(frozen=True)
class Preset:
    """A strategy with its settings, and why these: where they were measured, who published them, or our caution."""

    strategy: Strategy
    evidence: Literal["measured", "published", "cautious"]
    words: str

    @property
    def told(self) -> str:
        """Where it comes from, as a sentence."""
        if self.evidence == "measured":
            return f"Measured on this model: {self.words}."
        if self.evidence == "published":
            return f"Published by {self.words}, for a rule without forecast; not measured by Refrain on this model."
        return f"A cautious choice, not measured on this family: {self.words}."


@dataclass(frozen=True)
class Choice:
    """What to sample with, and why, in words for people. Without a strategy: leave the model as it is."""

    strategy: Strategy | None
    words: str
    steps: int = 0  # of the runs that it is for; 0: any


def choose(family: str, quality: str, steps: int = 0, model_name: str = "", measured: Measured | None = None) -> Choice:
    """What was measured on this very model; else the preset of its family. One that is not in the table gets the
    cautious one; `model_name` then says what it is.

    With `steps` 0 its strategy itself computes everything in runs of few steps. Raises ValueError if there is no such
    quality.
    """
    if quality not in QUALITIES:
        raise ValueError(f"There is no quality {quality!r}. Choose one of: {', '.join(QUALITIES)}.")
    told = TOLD.format(counted(steps, "step")) if steps else FROM_RUN
    if measured:
        return _as_measured(measured, quality, steps)
    if 0 < steps <= TOO_FEW_STEPS:
        nothing = NOTHING_TO_REUSE.format(steps=counted(steps, "step"), most=TOO_FEW_STEPS)
        return Choice(None, f"{nothing} {told}")
    preset = PRESETS.get(family, PRESETS[OTHER])[quality]
    name, settings = described([preset.strategy])
    is_known = family in UNPUBLISHED or (family in PRESETS and family != OTHER)
    model = family if is_known else model_name or "unknown model"
    strategy = preset.strategy if steps else replace(preset.strategy, few_steps=COMPUTE_ALL)
    return Choice(strategy, f"{model}, {quality}: {name}, {settings}. {preset.told} {SHOWN} {told}")


def _as_measured(measured: Measured, quality: str, steps: int) -> Choice:
    """For the steps it was measured with. The run says where it has others; of few it then computes everything."""
    name, settings = described([measured.strategy])
    words = f"{measured.model.family}, {quality}: {name}, {settings}. {measured.told}"
    if steps or measured.steps <= TOO_FEW_STEPS:
        return Choice(measured.strategy, words, measured.steps)
    return Choice(replace(measured.strategy, few_steps=COMPUTE_ALL), f"{words} {FROM_RUN}", measured.steps)


def _first_block(threshold: float, **limits: float) -> FirstBlockCache:
    return FirstBlockCache(residual_diff_threshold=threshold, **limits)


def _measured(strategy: Strategy, words: str) -> Preset:
    return Preset(strategy, "measured", words)


def _published(threshold: float, words: str, **limits: float) -> Preset:
    return Preset(_first_block(threshold, **limits), "published", words)


def _cautious(
    threshold: float, words: str = "First Block Cache below its default threshold", **limits: float
) -> Preset:
    return Preset(_first_block(threshold, **limits), "cautious", words)


def _of(visually_identical: Preset, balanced: Preset, fast: Preset) -> Mapping[str, Preset]:
    return dict(zip(QUALITIES, (visually_identical, balanced, fast), strict=True))


_FORECAST = "forecasts of the output, which need no blocks"
_SOUND = "low, as the sound of others' cached runs suffered before the picture (sglang, issue 33828, on MiniMax-H3)"
_OTHER_WAN = "below what is published for Wan's text and image to video"
_H3 = {"max_consecutive_cache_hits": 2, "start_percent": 0.1, "end_percent": 0.95}  # of duckyshell's node
_T8 = {"max_consecutive_cache_hits": 2, "start_percent": 0.1, "end_percent": 0.85}  # of T8's node

PRESETS: Mapping[str, Mapping[str, Preset]] = {
    DEMO: _of(
        _measured(
            TaylorSeerCache(target_speedup=1.5),
            "20 steps at flow shifts 1 to 6, 65 % of the blocks computed, 54 to 57 dB",
        ),
        _measured(
            TaylorSeerCache(cache_interval=2),
            "20 steps at flow shifts 1 to 6, 55 % of the blocks computed, 46 to 52 dB",
        ),
        _measured(
            TaylorSeerCache(target_speedup=2),
            "20 steps at flow shifts 1 to 6, 50 % of the blocks computed, 41 to 48 dB",
        ),
    ),
    VIDEO_DEMO: _of(
        _measured(
            TaylorSeerCache(target_speedup=1.5),
            "20 steps at flow shifts 3 and 8, 65 % of the blocks computed, 54 to 58 dB",
        ),
        _measured(
            TaylorSeerCache(cache_interval=2),
            "20 steps at flow shifts 3 and 8, 55 % of the blocks computed, 51 to 53 dB",
        ),
        _measured(
            _first_block(0.2),
            "20 steps at flow shifts 3 and 8, 47 % of the blocks computed, 36 to 42 dB",
        ),
    ),
    "Flux.1": _of(
        _published(0.06, "ParaAttention (FLUX.1-dev, 28 steps, 1.2x on an L20)"),
        _published(0.08, "ParaAttention (its default; FLUX.1-dev, 28 steps, 1.55x on an L20)"),
        _published(0.12, "ParaAttention (1.9x on an L20) and Comfy-WaveSpeed (both FLUX.1-dev, 28 steps)"),
    ),
    "Flux.2": _of(
        _cautious(0.06),
        _cautious(0.08),
        _published(0.12, "xDiT, pull request 719 (FLUX.2-dev, 50 steps at 2048 x 2048, SSIM 0.958)"),
    ),
    "Stable Diffusion 3": _of(
        _cautious(0.06), _cautious(0.08), _published(0.12, "Comfy-WaveSpeed (SD 3.5 Large in fp8, 30 steps)")
    ),
    "Qwen-Image": _of(_cautious(0.06), _cautious(0.08), _published(0.2, "diffusers' documentation, as an example")),
    "Qwen-Image 2.1": _of(
        _published(0.03, "T8's block cache, for edits (1 image, 40 steps of which 6 were reused)", **_T8),
        _cautious(0.06, "between what T8's block cache has for edits and for text to image", **_T8),
        _published(
            0.08, "T8's block cache (text to image, 25 steps, 1.6x on an RTX 4060 Ti; edits changed visibly)", **_T8
        ),
    ),
    "HunyuanVideo": _of(
        _published(0.06, "ParaAttention (its default; 30 steps, 129 frames at 720p, 1.6x on an L20)"),
        _published(0.1, "Comfy-WaveSpeed (fp8, 20 steps)"),
        _published(0.2, "diffusers, pull request 11180 (4.3x; higher values blur)"),
    ),
    "LTX-Video": _of(
        _published(0.05, "diffusers, pull request 11180 (1.5x)"),
        _published(0.1, "Comfy-WaveSpeed (LTX-Video 2B 0.9.1, 30 steps)"),
        _published(0.2, "diffusers, pull request 11180 (3.3x; higher values blur)"),
    ),
    "LTX-2": _of(_cautious(0.04, _SOUND), _cautious(0.06, _SOUND), _cautious(0.08, _SOUND)),
    "Wan 2.1 and 2.2, text or image to video": _of(
        _published(0.05, "diffusers, pull request 11180 (Wan 2.1 1.3B, 1.6x)"),
        _published(0.1, "mold, pull request 939 (Wan 2.2 14B, 20 steps, 1.85x on an RTX 4090; 0.05 reused nothing)"),
        _published(0.2, "diffusers, pull request 11180 (Wan 2.1 1.3B, 3.9x; higher values blur)"),
    ),
    "Wan 2.1 and 2.2, other kinds": _of(
        _cautious(0.05, _OTHER_WAN), _cautious(0.06, _OTHER_WAN), _cautious(0.08, _OTHER_WAN)
    ),
    "MiniMax-H3": _of(
        _published(0.08, "duckyshell's FirstBlockCache, as safe (20 steps)", **_H3),
        _published(0.1, "duckyshell's FirstBlockCache (its default; 20 steps, 1.44x to 1.49x on an RTX 5090)", **_H3),
        _published(0.12, "duckyshell's FirstBlockCache, as aggressive (20 steps)", **_H3),
    ),
    "Mochi": _of(
        _cautious(0.01, "below the published threshold"),
        _cautious(0.02, "below the published threshold"),
        _published(0.03, "ComfyUI_Patches_ll (1.5x, with visible losses)"),
    ),
    UNET: _of(
        Preset(TaylorSeerCache(target_speedup=1.3), "cautious", _FORECAST),
        Preset(TaylorSeerCache(target_speedup=1.5), "cautious", _FORECAST),
        Preset(TaylorSeerCache(cache_interval=2), "cautious", _FORECAST),
    ),
    OTHER: _of(_cautious(0.06), _cautious(0.08), _cautious(0.12, "First Block Cache at its default threshold")),
}
