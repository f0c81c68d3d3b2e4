"""Prompts for a ComfyUI with this pack and the tests' nodes: the demo with a cache, and random ones."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from cache_core.strategies import all_strategies
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategy.strategy import Strategy

DEMOS = ("RefrainLoadDemo", "RefrainLoadVideoDemo")  # the nodes that load one: they have no inputs
VIDEO_WEIGHTS = "tiny_wan.safetensors"
SAMPLERS = (
    "euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "lcm",
    "uni_pc", "res_multistep", "er_sde", "ddim", "deis", "ipndm", "gradient_estimation",
)  # fmt: skip
SCHEDULERS = ("simple", "normal", "beta", "sgm_uniform", "kl_optimal")
WIDTHS, HEIGHTS, BATCHES, LENGTHS = (32, 64, 96, 128), (32, 64, 96), (1, 1, 2, 3), (1, 5, 9)
TEXTS = ("a big red ball at the center on a blue striped background", "a small green square", "a yellow ring", "")
OFF = {  # settings with which a strategy never reuses anything
    "FirstBlockCache": {"residual_diff_threshold": 0.0},
    "TaylorSeerCache": {"cache_interval": 1},
    "PyramidAttentionBroadcast": {
        f"{kind}_attention_block_skip_range": 1 for kind in ("spatial", "temporal", "cross")
    },
    "FasterCache": {
        f"{what}_skip_range": 1
        for what in ("spatial_attention_block", "temporal_attention_block", "unconditional_batch")
    },
}  # fmt: skip
CACHE_NODES = {f"Refrain{kind.__name__}": kind for kind in all_strategies()}
LOADERS = {"demo": "1", "video": "2"}  # the ids of their nodes
CACHE, SAMPLER, REPORT, FINGERPRINT, CENSUS = "10", "20", "21", "22", "23"
CHANCES = {"success": 80, "interrupted": 12, "error": 8}
MOST_STEPS = 16  # caches that go by the schedule rest up to 8
TOO_MANY_STEPS = 400  # of a prompt that is to be cancelled


def demo(kind: type[Strategy], steps: int = 4, **inputs: Any) -> dict[str, Any]:
    """A prompt of the demo with this cache, where some inputs of its node are others."""
    prompt = {
        "1": node("RefrainLoadDemo"),
        CACHE: cache_node(kind(), ["1", 0]),
        "4": node("CLIPTextEncode", clip=["1", 1], text="a big red ball"),
        "5": node("CLIPTextEncode", clip=["1", 1], text=""),
        "6": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        SAMPLER: node(
            "KSampler", model=[CACHE, 0], positive=["4", 0], negative=["5", 0], latent_image=["6", 0], seed=1,
            steps=steps, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        REPORT: node("RefrainCacheReport", samples=[SAMPLER, 0]),
        FINGERPRINT: node("TestFingerprint", samples=[REPORT, 0]),
    }  # fmt: skip
    prompt[CACHE]["inputs"] |= inputs
    return prompt


@dataclass(frozen=True)
class Drawn:
    """One random prompt, and what is to become of it."""

    prompt: dict[str, Any]
    ending: str = "success"  # or interrupted, after `progress` steps, or error
    progress: int = 0
    strategies: tuple[Strategy, ...] = ()  # those of its cache nodes, in their order

    @property
    def is_off(self) -> bool:
        """Whether its result must be that of the same prompt without a cache."""
        return all(strategy.is_off for strategy in self.strategies)

    def without_cache(self) -> Drawn:
        """The same with its cache nodes taken out."""
        prompt = copy.deepcopy(self.prompt)
        caches = [number for number, each in prompt.items() if each["class_type"] in CACHE_NODES]
        while prompt[SAMPLER]["inputs"]["model"][0] in caches:
            prompt[SAMPLER]["inputs"]["model"] = prompt[prompt[SAMPLER]["inputs"]["model"][0]]["inputs"]["model"]
        prompt = {number: each for number, each in prompt.items() if number not in caches}
        return replace(self, prompt=prompt, strategies=())


def census() -> dict[str, Any]:
    """What is alive, with nothing but the models kept."""
    prompt = {LOADERS["demo"]: node("RefrainLoadDemo"), LOADERS["video"]: _video_loader()}
    kept = {"model": [LOADERS["demo"], 0], "other": [LOADERS["video"], 0]}
    return {**prompt, CENSUS: node("TestCensus", **kept)}


def draw(dice: random.Random, before: Drawn | None, endings: Sequence[str]) -> Drawn:
    """The next prompt. Sometimes the one before without its cache nodes, or with another seed, or the very same."""
    if before is not None and before.ending == "success" and dice.random() < 0.45:
        change = dice.choices(["cache nodes removed", "another seed", "nothing"], [1, 3, 1])[0]
        if change == "cache nodes removed":
            return before.without_cache()
        again = copy.deepcopy(before)
        if change == "another seed":
            again.prompt[SAMPLER]["inputs"]["seed"] = dice.randrange(2**64)
        return again
    ending = dice.choices(endings, [CHANCES[ending] for ending in endings])[0]
    return _drawn(dice, ending, draw_strategies(dice))


def heaviest() -> list[dict[str, Any]]:
    """Each sampler and scheduler with each model at its largest: what a process loads and sets aside only once."""
    dice, prompts = random.Random(0), []
    for number, (sampler, model) in enumerate(product(SAMPLERS, ("demo", "video"))):
        prompt = _drawn(dice, "success", tuple(kind() for kind in all_strategies()), model).prompt
        prompt["6"]["inputs"] |= {"width": max(WIDTHS), "height": max(HEIGHTS), "batch_size": max(BATCHES)}
        if model == "video":
            prompt["6"]["inputs"]["length"] = max(LENGTHS)
        chosen = {"sampler_name": sampler, "scheduler": SCHEDULERS[number // 2 % len(SCHEDULERS)]}
        prompt[SAMPLER]["inputs"] |= {**chosen, "steps": MOST_STEPS, "cfg": 3.0, "denoise": 1.0}
        prompts.append(prompt)
    return prompts


def every_size() -> list[dict[str, Any]]:
    """The demo's pictures in each size: torch keeps some 400 KB for the decoder's convolutions at each."""
    prompts = []
    for width, height, batch_size in product(WIDTHS, HEIGHTS, sorted(set(BATCHES))):
        prompt = demo(FirstBlockCache, steps=1) | _picture()
        prompt["6"]["inputs"] |= {"width": width, "height": height, "batch_size": batch_size}
        prompts.append(prompt)
    return prompts


def draw_strategies(dice: random.Random) -> tuple[Strategy, ...]:
    """None to three in a row; one in five with settings that are off."""
    count = dice.choices([0, 1, 2, 3], [15, 55, 25, 5])[0]
    return tuple(
        kind(**OFF[kind.__name__]) if dice.random() < 0.2 else draw_settings(dice, kind)
        for kind in dice.sample(all_strategies(), count)
    )


def draw_settings(dice: random.Random, kind: type[Strategy]) -> Strategy:
    """A strategy with random settings that do not contradict each other."""
    while True:
        settings = {
            each.name: _value(dice, each.default, each.metadata)
            for each in fields(kind)
            if each.metadata.get("shown") and dice.random() < 0.5
        }
        strategy = kind(**settings)
        if not strategy.contradiction:
            return strategy


def _value(dice: random.Random, default: Any, allowed: Any) -> Any:
    if allowed["choices"]:
        return dice.choice(allowed["choices"])
    low, high = allowed["minimum"], allowed["maximum"]
    if isinstance(default, float):
        return dice.choice([low, high, dice.uniform(low, high)])
    return dice.choice([low, high, default, min(low + dice.randrange(1, 4), high), dice.randint(low, high)])


def _drawn(dice: random.Random, ending: str, strategies: tuple[Strategy, ...], model: str = "") -> Drawn:
    model = model or dice.choice(["demo", "demo", "shifted demo", "video"])
    prompt = {LOADERS["demo"]: node("RefrainLoadDemo"), LOADERS["video"]: _video_loader()}
    if dice.random() < 0.9:  # both models stay loaded
        prompt |= {f"keep {model}": node("PreviewAny", source=[loader, 0]) for model, loader in LOADERS.items()}
    source = [LOADERS["video" if model == "video" else "demo"], 0]
    if model == "shifted demo":
        prompt["3"] = node("ModelSamplingAuraFlow", model=source, shift=dice.choice([1.73, 3.0, 6.0]))
        source = ["3", 0]
    for number, strategy in enumerate(strategies, start=int(CACHE)):
        prompt[str(number)] = cache_node(strategy, source)
        source = [str(number), 0]
    prompt |= _texts(dice, "video" if (model == "video") != (ending == "error") else "demo")  # the other's is an error
    prompt["6"] = _latent(dice, model)
    steps = TOO_MANY_STEPS if ending == "interrupted" else dice.randint(1, MOST_STEPS)
    prompt[SAMPLER] = node(
        "KSampler", model=source, positive=["4", 0], negative=["5", 0], latent_image=["6", 0], steps=steps,
        seed=dice.randrange(2**64), cfg=dice.choice([1.0, 1.5, 3.0, 5.0]), sampler_name=dice.choice(SAMPLERS),
        scheduler=dice.choice(SCHEDULERS), denoise=dice.choice([1.0, 1.0, 1.0, 0.6]),
    )  # fmt: skip
    prompt[REPORT] = node("RefrainCacheReport", samples=[SAMPLER, 0])
    prompt[FINGERPRINT] = node("TestFingerprint", samples=[REPORT, 0])
    if model != "video" and dice.random() < 0.3:
        prompt |= _picture()
    return Drawn(prompt, ending, dice.randint(1, 20), strategies)


def _texts(dice: random.Random, model: str) -> dict[str, Any]:
    if model == "video":
        return {number: node("TestRandomText", seed=dice.randrange(100), width=4096) for number in ("4", "5")}
    clip = [LOADERS["demo"], 1]
    return {number: node("CLIPTextEncode", clip=clip, text=dice.choice(TEXTS)) for number in ("4", "5")}


def _latent(dice: random.Random, model: str) -> dict[str, Any]:
    size = {"width": dice.choice(WIDTHS), "height": dice.choice(HEIGHTS), "batch_size": dice.choice(BATCHES)}
    if model == "video":
        return node("EmptyHunyuanLatentVideo", length=dice.choice(LENGTHS), **size)
    return node("EmptySD3LatentImage", **size)


def _picture() -> dict[str, Any]:
    decoded = node("VAEDecode", samples=[REPORT, 0], vae=[LOADERS["demo"], 2])
    return {"24": decoded, "25": node("PreviewImage", images=["24", 0])}


def _video_loader() -> dict[str, Any]:
    return node("UNETLoader", unet_name=VIDEO_WEIGHTS, weight_dtype="default")


def cache_node(strategy: Strategy, model: list) -> dict[str, Any]:
    """The node of a strategy, with its settings, linked to this output."""
    shown = {each.name: getattr(strategy, each.name) for each in fields(strategy) if each.metadata.get("shown")}
    return node(f"Refrain{type(strategy).__name__}", model=model, **shown)


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of a prompt."""
    return {"class_type": kind, "inputs": inputs}
