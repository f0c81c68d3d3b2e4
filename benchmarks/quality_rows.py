"""What `quality.py` compares: methods, each at several settings, as data."""

from __future__ import annotations

from dataclasses import dataclass

from cache_core.demo.methods import STEPS
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.strategy import Strategy

PUBLISHED = dict(spatial_attention_timestep_skip_end=681, unconditional_batch_timestep_skip_end=641)  # FasterCache's
UNCACHED, FEWER_STEPS = "Uncached", "Fewer steps, no cache"


@dataclass(frozen=True)
class ComfyUICache:
    """One of the two caches that ComfyUI has itself, with its node's defaults but for the threshold."""

    node: str  # EasyCache or LazyCache
    threshold: float
    handed_a_clone: bool = False  # EasyCache writes its skipped output into the input that the sampler still needs
    reads_every_pixel: bool = False  # both read one latent pixel in 8 x 8: of the demo's latent, one in all


@dataclass(frozen=True)
class Row:
    """A way to make the same pictures with less work. Without strategy and cache it is an uncached run."""

    method: str
    setting: str = ""
    steps: int = STEPS
    strategy: Strategy | None = None
    then: Strategy | None = None  # another after it
    comfyui: ComfyUICache | None = None
    sampler: str = "euler"  # in ComfyUI


def uncached(steps: int = STEPS) -> Row:
    """What the others are compared with."""
    return Row(UNCACHED, f"{steps} steps", steps)


def rows() -> list[Row]:
    """All that is compared with the uncached run, method by method, each from careful to fast."""
    return [
        *(Row(FEWER_STEPS, f"{steps} steps", steps=steps) for steps in (19, 18, 16, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5)),
        *(Row("Fewer steps, dpmpp_2m", f"{steps} steps", steps=steps, sampler="dpmpp_2m") for steps in (14, 12, 10, 8)),
        *_first_block_cache(),
        *_taylorseer(),
        *_pyramid_attention_broadcast(),
        *_faster_cache(),
        *of_comfyui("EasyCache, handed a clone", "EasyCache", (0.05, 0.1, 0.2, 0.4), handed_a_clone=True),
        *of_comfyui(
            "EasyCache, every pixel", "EasyCache", (0.1, 0.2, 0.4), handed_a_clone=True, reads_every_pixel=True
        ),
        *of_comfyui("EasyCache as shipped", "EasyCache", (0.1, 0.2)),
        *of_comfyui("LazyCache", "LazyCache", (0.05, 0.1, 0.2, 0.4)),
    ]


def _first_block_cache() -> list[Row]:
    variants = [
        ("First Block Cache, repair", "on", 1, (0.04, 0.08, 0.12, 0.2)),
        ("First Block Cache", "off", 1, (0.04, 0.08, 0.12, 0.2, 0.3, 0.5)),
        ("First Block Cache, no forecast", "off", 0, (0.08, 0.12, 0.3)),
    ]
    return [
        Row(method, f"threshold {value:g}", strategy=FirstBlockCache(value, max_order=order, repair=repair))
        for method, repair, order, thresholds in variants
        for value in thresholds
    ]


def _taylorseer() -> list[Row]:
    ours = {f"interval {interval}": dict(cache_interval=interval, repair="off") for interval in (2, 3, 4, 5, 6)}
    repaired = {f"interval {interval}": dict(cache_interval=interval, repair="on") for interval in (2, 3)}
    others = {
        "interval 3, order 0": dict(cache_interval=3, max_order=0),
        "interval 2, order 2": dict(cache_interval=2, max_order=2),
        "interval 3, order 2": dict(cache_interval=3, max_order=2),
        "interval 3, level model": dict(cache_interval=3, cache_level="model"),
        "interval 3, level module": dict(cache_interval=3, cache_level="module"),
    }
    asked_for = {f"{speed_up:g}x": dict(target_speedup=speed_up, repair="on") for speed_up in (1.5, 1.8, 2.0)}
    published = dict(spacing="steps", weights="recursion", repair="off")
    as_published = {f"interval {interval}": dict(cache_interval=interval, **published) for interval in (2, 3, 4, 5)}
    per_module = {
        f"interval {interval}, level module": dict(cache_interval=interval, cache_level="module", **published)
        for interval in (3, 5)
    }
    return [
        Row(method, setting, strategy=TaylorSeerCache(**settings))
        for method, variants in (
            ("TaylorSeer", ours),
            ("TaylorSeer, repair", repaired),
            ("TaylorSeer, asked for a speed-up", asked_for),
            ("TaylorSeer, orders and levels", others),
            ("TaylorSeer as published", as_published),
            ("TaylorSeer as published, per module", per_module),
        )
        for setting, settings in variants.items()
    ]


def _pyramid_attention_broadcast() -> list[Row]:
    always = dict(spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=1001)
    return [
        Row(
            method,
            f"range {skip_range}",
            strategy=PyramidAttentionBroadcast(spatial_attention_block_skip_range=skip_range, **window),
        )
        for method, window in (("Pyramid Attention Broadcast", {}), ("PAB in all timesteps", always))
        for skip_range in (2, 3, 5)
    ]


def _faster_cache() -> list[Row]:
    """The range of 1 is off: no attention is extrapolated, or no negative prompt is left out."""
    return [
        Row(
            method,
            f"attention {attention}, negative prompt {negative}",
            strategy=FasterCache(
                spatial_attention_block_skip_range=attention, unconditional_batch_skip_range=negative, **windows
            ),
        )
        for method, ranges, windows in (
            ("FasterCache", ((2, 2), (2, 3), (2, 5)), {}),
            ("FasterCache, attention only", ((2, 1),), {}),
            ("FasterCache, negative prompt only", ((1, 2),), {}),
            ("FasterCache as published", ((2, 5),), PUBLISHED),
        )
        for attention, negative in ranges
    ]


def of_comfyui(method: str, node: str, thresholds: tuple[float, ...], **changes: bool) -> list[Row]:
    """One of ComfyUI's own caches at these thresholds."""
    return [
        Row(method, f"threshold {threshold:g}", comfyui=ComfyUICache(node, threshold, **changes))
        for threshold in thresholds
    ]
