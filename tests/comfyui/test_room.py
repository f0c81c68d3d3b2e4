"""What a cache may hold beside a model: by ComfyUI's account, by a limit of the user's, and on a card of 24 GB."""

import importlib
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from random_models import SHAPES
from zoo import all_architectures
from zoo.cases import AGGRESSIVE
from zoo.sampling import Work, specimen_of

from cache_core.model import is_attention, kind_of
from cache_core.run.budget import GIB
from cache_core.run.run import CacheRun
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategy.step import Schedule

PROMPT = "a big red ball at the center on a blue striped background"
ALWAYS = dict(spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=1001)
BROADCAST = PyramidAttentionBroadcast(**ALWAYS)
FASTER = FasterCache(unconditional_batch_skip_range=5, unconditional_batch_timestep_skip_end=641, **ALWAYS)
by_strategy = pytest.mark.parametrize("strategy", [BROADCAST, FASTER], ids=lambda strategy: strategy.title)


@by_strategy
def test_a_limit_at_half_of_what_is_needed_keeps_half_of_the_attentions(demo, cached, reports, strategy):
    demo.sample(cached(demo.model(), strategy), [PROMPT], steps=20)
    needed = reports.all[0].bytes_foretold
    limited = replace(strategy, memory_limit_gb=needed / 2 / GIB)
    latent = demo.sample(cached(demo.model(), limited), [PROMPT], steps=20)
    whole, half = reports.all
    assert 0.45 * needed <= half.bytes_foretold <= needed / 2
    assert 0.3 * needed <= half.bytes_held <= half.bytes_foretold  # a prompt that is skipped keeps nothing
    assert half.count("reused", "forecast") == whole.count("reused", "forecast") >= 5
    saved, less = (1 - report.computed_share for report in (whole, half))
    assert saved / 4 <= less <= 0.8 * saved
    (note,) = [note for note in half.notes if "fit in" in note]
    assert re.match(f"{strategy.title}: [23] of 6 attentions fit in .*memory_limit_gb", note)
    assert (latent - demo.sample(demo.model(), [PROMPT], steps=20)).norm() < 0.3 * latent.norm()


def test_a_limit_at_half_of_what_a_tiny_wan_needs_keeps_half_of_its_attentions(comfy):
    strategy = replace(BROADCAST, few_steps="draft")
    for tiny in specimen_of(next(each for each in all_architectures() if each.config == "WAN21_T2V")):
        whole = tiny.refined(strategy).report
        limit = whole.bytes_foretold / 2
        half = tiny.refined(replace(strategy, memory_limit_gb=limit / GIB)).report
    (note,) = [note for note in half.notes if "attentions fit in" in note]
    fitting, all_of_them = map(int, re.search(r"(\d+) of (\d+) attentions", note).groups())
    assert fitting * 2 == all_of_them and 0.9 * limit <= half.bytes_held <= half.bytes_foretold <= limit
    assert half.count("reused") == whole.count("reused") >= 2
    assert 1 - half.computed_share == pytest.approx((1 - whole.computed_share) / 2)


class AttentionWork(Work):
    """How many bytes each attention module in these lists gives, and what all of its runs in a `with` take, by name."""

    def __init__(self, network, lists):
        super().__init__()
        self.gives, self.took, self._began = {}, Counter(), 0
        for name, module in network.named_modules():
            if name.startswith(tuple(f"{each}." for each in lists)) and is_attention(name):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(partial(self._end, name))

    def _begin(self, *_):
        self._began = self.flops

    def _end(self, name, module, args, output):
        self.gives[name], self.took[name] = output.nbytes, self.took[name] + self.flops - self._began


def kept_by_kind(gives, limit):
    """Those that are kept if attention to another stream goes first, and then what is met last."""
    kept = []
    for name in gives:
        kept.append(name)
        while sum(map(gives.get, kept)) > limit:
            least = min(kept, key=lambda each: kind_of(each) != "cross")
            kept.remove(name if kind_of(least) == kind_of(name) else least)
    return kept


def test_the_attentions_that_save_most_work_a_byte_are_kept_of_a_tiny_ltx_2(comfy):
    """Of those to another stream the sound's to the picture save most: few queries, which are kept, and many keys."""
    for tiny in specimen_of(next(each for each in all_architectures() if each.config == "LTXAV")):
        needed = tiny.refined(AGGRESSIVE[2]).report.bytes_foretold
        with AttentionWork(tiny.network, tiny.architecture.chains) as seen:
            tiny.refined(None)
        work, limit = Counter(seen.took), sum(seen.gives.values()) / 2
        seen.took.clear()
        with seen:
            report = tiny.refined(replace(AGGRESSIVE[2], memory_limit_gb=needed / 2 / GIB)).report
    kept = {name for name in work if seen.took[name] < work[name]}
    ordered = sorted(work, key=lambda name: work[name] / seen.gives[name], reverse=True)
    fitting = [held <= limit for held in accumulate(map(seen.gives.get, ordered))]
    first_out = ordered[fitting.index(False)]
    best = {name for name in ordered if work[name] / seen.gives[name] > work[first_out] / seen.gives[first_out]}
    assert {name for name in work if name.endswith((".attn1", ".video_to_audio_attn"))} <= best <= kept
    assert f" {len(kept)} of {len(work)} attentions fit in" in " ".join(report.notes) and report.count("reused") >= 2
    assert sum(map(work.get, kept)) > sum(map(work.get, kept_by_kind(seen.gives, limit)))
    largest = needed * max(seen.gives.values()) / sum(seen.gives.values())
    assert needed / 2 - largest < report.bytes_held <= report.bytes_foretold <= needed / 2


def test_what_comfyui_says_is_free_less_what_the_model_needs_may_be_held(demo, comfy, cached, reports, monkeypatch):
    free = {"bytes": 0}

    def get_free_memory(device=None, torch_free_too=False):
        return (free["bytes"], free["bytes"]) if torch_free_too else free["bytes"]

    monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)
    demo.sample(cached(demo.model(), BROADCAST), [PROMPT], steps=20)
    free["bytes"] = 10**12
    demo.sample(cached(demo.model(), BROADCAST), [PROMPT], steps=20)
    nothing, everything = reports.all
    assert nothing.count("computed") == len(nothing.calls) and nothing.bytes_held == 0
    assert any("0 of 6 attentions fit in 0 GiB, which is what was free" in note for note in nothing.notes)
    assert everything.count("reused") >= 5 and not everything.notes


def test_weights_that_are_fetched_as_they_are_used_count_as_free(comfy, monkeypatch):
    from cache_core.adapters.comfyui.room import free_beside

    device, management = torch.device("cpu"), comfy.model_management
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: 5 * GIB)
    monkeypatch.setattr(management, "EXTRA_RESERVED_VRAM", 0)
    entries = [
        SimpleNamespace(device=device, model=SimpleNamespace(is_dynamic=lambda dynamic=dynamic: dynamic,
                                                             loaded_size=lambda: 10 * GIB))
        for dynamic in (True, False)
    ]  # fmt: skip
    monkeypatch.setattr(management, "current_loaded_models", entries)
    model = SimpleNamespace(model=SimpleNamespace(memory_required=lambda shape: shape[0] * GIB))
    assert free_beside(model, (3, 16, 8, 8), device) == (5 + 10 - 3) * GIB
    assert free_beside(model, (14, 16, 8, 8), device) == 0.25 * 15 * GIB  # the estimate is generous


@pytest.mark.parametrize(("reserve", "room"), [(0, 6), (2, 4), (6, 0.25 * (8 - 6)), (9, 0)])
def test_what_comfyui_reserves_for_other_programs_is_not_free(comfy, monkeypatch, reserve, room):
    from cache_core.adapters.comfyui.room import free_beside

    management = comfy.model_management
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: 8 * GIB)
    monkeypatch.setattr(management, "EXTRA_RESERVED_VRAM", reserve * GIB)  # as by --reserve-vram
    monkeypatch.setattr(management, "current_loaded_models", [])
    model = SimpleNamespace(model=SimpleNamespace(memory_required=lambda shape: shape[0] * GIB))
    assert free_beside(model, (2, 16, 8, 8), torch.device("cpu")) == room * GIB


@pytest.fixture(scope="module")
def wan(comfy):
    """Wan 14B for 81 frames of 832 x 480, without values; a call of it for two branches."""
    operations = importlib.import_module("comfy.ops").disable_weight_init
    module = pytest.importorskip("comfy.ldm.wan.model")
    kind = dict(device="meta", dtype=torch.bfloat16)
    model = module.WanModel(**SHAPES["wan"].unet, operations=operations, **kind)
    given = [torch.empty(2, *shape, **kind) for shape in ((16, 21, 60, 104), (), (512, 4096))]
    return model, partial(model, *given)


def sampled_on_a_card(wan, strategy, free, free_away=None):
    """The report of some steps, and how many attentions ran in each of them."""
    from comfy.ldm.modules.attention import attention_pytorch

    (model, call), ran = wan, []
    schedule = Schedule([1 - step / 20 for step in range(21)])
    bytes_away = None if free_away is None else free_away * GIB
    run = CacheRun([strategy], schedule, free=lambda device: free * GIB, free_away=lambda device: bytes_away)

    def operation(*args, **kwargs):
        ran.append(1)
        return attention_pytorch(*args, **kwargs)

    attend = lambda _, *args, **kwargs: run.call_attention(operation, *args, **kwargs)  # noqa: E731
    forward = partial(call, transformer_options={"optimized_attention_override": attend})
    counts = []
    for sigma in schedule.sigmas[6:12]:
        ran.clear()
        run.begin_evaluation()
        run.call_model(model, forward, torch.full((2,), sigma), ["negative", "positive"])
        counts.append(len(ran))
    return run.report, counts


@pytest.mark.parametrize(
    ("strategy", "free"),
    [
        *((strategy, free) for strategy in (PyramidAttentionBroadcast(), FasterCache()) for free in (4, 12)),
        (PyramidAttentionBroadcast(cache_dtype="8 bit"), 4),
    ],
)
def test_defaults_on_wan_14b_ask_for_no_more_than_what_a_card_has_left_and_still_reuse(
    wan, strategy, free, monkeypatch
):
    """Of 24 GB a card that streams the weights has 12 left, or 4 beside a model that needs more."""
    monkeypatch.setattr("cache_core.strategy.packed.AT_ONCE", 2**40)  # tensors without values take no memory
    report, counts = sampled_on_a_card(wan, strategy, free)
    (note,) = [note for note in report.notes if "attentions fit in" in note]
    fitting = int(note.split(": ")[1].split(" of 40")[0])
    assert 0.9 * free * GIB <= report.bytes_held <= report.bytes_foretold <= free * GIB
    assert fitting >= (12 if strategy.cache_dtype == "8 bit" else 3)
    assert max(counts) == 80 and min(counts) == 80 - fitting  # 40 blocks, each with attention of two kinds
    assert counts.count(80 - fitting) >= 2


@pytest.mark.parametrize(("strategy", "free_away"), [(PyramidAttentionBroadcast(), 8), (FasterCache(), 64)])
def test_what_does_not_fit_on_the_card_waits_in_main_memory_as_far_as_that_goes(wan, strategy, free_away, monkeypatch):
    monkeypatch.setattr("cache_core.strategy.lane.HOST", torch.device("meta"))
    report, counts = sampled_on_a_card(wan, strategy, 4, free_away)
    (note,) = [note for note in report.notes if "attentions fit in" in note]
    fit, waiting = (int(number) for number in re.search(r"(\d+) of 40 .* (\d+) wait in main memory", note).groups())
    assert (fit + waiting == 40) == (free_away == 64) == (not note.endswith("always run"))
    assert 0.8 * 4 * GIB <= report.bytes_held <= 4 * GIB
    assert report.bytes_away == report.bytes_foretold_away == report.bytes_held / fit * waiting <= free_away * GIB
    assert max(counts) == 80 and min(counts) == 80 - fit - waiting and counts.count(min(counts)) >= 2
