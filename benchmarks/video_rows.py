"""What `quality.py --model video` compares: also attention caches at many settings, and caches in turn."""

from __future__ import annotations

from dataclasses import replace

from quality_rows import FEWER_STEPS, PUBLISHED, Row, of_comfyui

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

WINDOWS = {"": (100, 800), " from timestep 950": (-1, 950), " in all timesteps": (-1, 1001)}


def rows() -> list[Row]:
    """All that is compared with the uncached run, method by method, each from careful to fast."""
    return [
        *(Row(FEWER_STEPS, f"{steps} steps", steps=steps) for steps in (19, 18, 17, 16, 14, 12, 10, 8)),
        *(
            Row("Fewer steps, dpmpp_2m", f"{steps} steps", steps=steps, sampler="dpmpp_2m")
            for steps in (16, 14, 12, 10)
        ),
        *_first_block_cache(),
        *_taylorseer(),
        *_pyramid_attention_broadcast(),
        *_faster_cache(),
        *_in_turn(),
        *of_comfyui("EasyCache, handed a clone", "EasyCache", (0.05, 0.1), handed_a_clone=True),
    ]


def _first_block_cache() -> list[Row]:
    return [
        Row(f"First Block Cache{told}", f"threshold {value:g}", strategy=FirstBlockCache(value, repair=repair))
        for told, repair in (("", "off"), (", repair", "on"))
        for value in (0.08, 0.12, 0.2)
    ]


def _taylorseer() -> list[Row]:
    asked_for = [("asked for a speed-up", f"{wish:g}x", dict(target_speedup=wish, repair="on")) for wish in (1.5, 1.8)]
    at_interval = [
        (told, f"interval {interval}", dict(cache_interval=interval, **settings))
        for told, settings, intervals in (
            ("", dict(repair="off"), (2, 3)),
            ("repair", dict(repair="on"), (2, 3)),
            ("level module", dict(cache_level="module"), (2, 3)),
            ("as published", dict(spacing="steps", weights="recursion", repair="off"), (2, 3)),
        )
        for interval in intervals
    ]
    return [
        Row(", ".join(filter(None, ("TaylorSeer", told))), setting, strategy=TaylorSeerCache(**settings))
        for told, setting, settings in at_interval + asked_for
    ]


def _pyramid_attention_broadcast() -> list[Row]:
    """The ranges of self-attention and of cross-attention, in the usual window and in larger ones."""
    ranges = {
        "": ((2, 1), (2, 3)),
        " from timestep 950": ((2, 1), (3, 1), (2, 3)),
        " in all timesteps": ((2, 1), (2, 3)),
    }
    return [
        Row(
            f"Pyramid Attention Broadcast{told}",
            f"self {own}, cross {cross}",
            strategy=PyramidAttentionBroadcast(
                spatial_attention_block_skip_range=own,
                cross_attention_block_skip_range=cross,
                **_within(WINDOWS[told], "spatial_attention", "cross_attention"),
            ),
        )
        for told, pairs in ranges.items()
        for own, cross in pairs
    ]


def _faster_cache() -> list[Row]:
    """The range of 1 is off: no attention is extrapolated, or no negative prompt is left out."""
    plain = dict(alpha_low_frequency=1.0, alpha_high_frequency=1.0)  # the difference of the prompts as it was measured
    later = _within((-1, 900), "spatial_attention", "unconditional_batch")
    variants = [
        ("FasterCache", ((2, 2), (2, 3)), {}),
        ("FasterCache, attention only", ((2, 1),), {}),
        ("FasterCache, attention only, as it was", ((2, 1),), dict(attention_weight=0.0)),
        ("FasterCache, negative prompt only", ((1, 2),), {}),
        ("FasterCache, negative prompt only, weights 1", ((1, 2),), plain),
        ("FasterCache from timestep 900", ((2, 2), (2, 3)), later),
        ("FasterCache as published", ((2, 5),), PUBLISHED),
    ]
    return [
        Row(
            method,
            f"attention {attention}, negative prompt {negative}",
            strategy=FasterCache(
                spatial_attention_block_skip_range=attention, unconditional_batch_skip_range=negative, **settings
            ),
        )
        for method, ranges, settings in variants
        for attention, negative in ranges
    ]


def _in_turn() -> list[Row]:
    first = Row("First Block Cache 0.08", strategy=FirstBlockCache(0.08))
    taylor = Row("TaylorSeer 2", strategy=TaylorSeerCache(2))
    pab = PyramidAttentionBroadcast()
    negative = FasterCache(spatial_attention_block_skip_range=1, unconditional_batch_skip_range=2)
    return [
        replace(row, method=f"{row.method}, then {told}", setting=setting, then=then)
        for row in (first, taylor)
        for told, setting, then in (
            ("PAB", "self 2", pab),
            ("FasterCache", "negative prompt 2", negative),
        )
    ]


def _within(window: tuple[int, int], *kinds: str) -> dict[str, int]:
    ends = zip(("start", "end"), window)
    return {f"{kind}_timestep_skip_{end}": timestep for end, timestep in ends for kind in kinds}
