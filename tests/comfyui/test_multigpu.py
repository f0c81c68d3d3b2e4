"""ComfyUI's multi-GPU work units, with two and three clones of the demo model on the CPU: branches run in threads."""

import gc
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_conditioning import GREEN, RED, combined, prompt, relative
from test_foreign_caches import PUBLISHED

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPT = "a big red ball at the center on a blue striped background"
STRATEGIES = [
    FirstBlockCache(residual_diff_threshold=0.3),
    FirstBlockCache(residual_diff_threshold=0.4, max_order=0),
    TaylorSeerCache(cache_interval=3),
    TaylorSeerCache(cache_interval=3, cache_level="model"),
    TaylorSeerCache(cache_interval=3, cache_level="module"),
    PyramidAttentionBroadcast(),
    FasterCache(unconditional_batch_skip_range=3),
]
every_strategy = pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=[pytest.mark.long] if n > 1 else []) for n, s in enumerate(STRATEGIES)],
    ids=lambda s: f"{type(s).__name__}-{s.levels[0]}-{getattr(s, 'max_order', 0)}",
)


@pytest.fixture(scope="module")
def work_units(comfy):
    return pytest.importorskip("comfy.multigpu", reason="this ComfyUI has no multi-GPU work units")


def clones_of_demo(count):
    """The demo as MultiGPU Work Units prepare it for so many devices, each of which is the CPU."""
    from cache_core.adapters.comfyui import demo

    model, *others = patchers = [demo.load_model() for _ in range(count)]
    for patcher in patchers:
        patcher.model.diffusion_model.to(torch.float32).dtype = torch.float32
        patcher.model.manual_cast_dtype = None
    for index, other in enumerate(others):
        other.load_device, other.is_multigpu_base_clone = torch.device("cpu", index), True
    model.set_additional_models("multigpu", others)
    networks = [patcher.model.diffusion_model for patcher in patchers]
    return SimpleNamespace(model=model, networks=networks)


@pytest.fixture(scope="module")
def clones(work_units):
    return clones_of_demo(2)


@pytest.fixture(scope="module")
def three_clones(work_units):
    return clones_of_demo(3)


@pytest.fixture
def sampled(demo, clones, reports):
    from cache_core.adapters.comfyui import with_cache

    def sample(strategy, model=clones.model, **options):
        latent = demo.sample(with_cache(model, strategy, watch=reports.watch), [PROMPT], steps=12, **options)
        return latent, reports.all[-1]

    return sample


@pytest.fixture
def one_after_the_other(comfy, monkeypatch):
    """Memory for one branch at a time: ComfyUI then calls the model for each branch, joining none."""

    def needed(self, shape, *args, **kwargs):
        return float("inf")

    return lambda: monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", needed)


def decisions(report):
    return sorted((call.evaluation, call.branches, call.action, call.measure) for call in report.calls)


def blocks_run(clones, monkeypatch):
    """How often each clone runs one of its blocks, counted from here on."""
    counts, owner = Counter(), {id(clone.single_blocks[1]): n for n, clone in enumerate(clones.networks)}
    block_class = type(clones.networks[0].single_blocks[1])
    own = block_class.forward

    def forward(self, *args, **kwargs):
        counts[owner.get(id(self))] += 1
        return own(self, *args, **kwargs)

    monkeypatch.setattr(block_class, "forward", forward)
    return counts


def computed(report, *only):
    """Which branches were computed in which evaluations."""
    calls = [call for call in report.calls if call.action == "computed"]
    found = {(call.evaluation, branch) for call in calls for branch in call.branches}
    return {each for each in found if not only or each[1] in only}


@every_strategy
def test_clones_in_threads_decide_and_draw_as_one_model_does(demo, sampled, one_after_the_other, strategy):
    latent, report = sampled(strategy)
    assert {call.branches for call in report.calls} == {("positive",), ("negative",)}
    assert report.count("reused", "forecast") >= 4
    joined, of_joined = sampled(strategy, demo.model())
    assert torch.allclose(latent, joined, atol=1e-3)  # other batch sizes sum in another order
    assert report.computed_share == pytest.approx(of_joined.computed_share)
    one_after_the_other()
    split, of_split = sampled(strategy, demo.model())
    assert torch.equal(latent, split) and decisions(report) == decisions(of_split)


IN_PART = {  # of the run
    "begins": lambda: prompt(RED) + prompt(GREEN, start_percent=0.5, end_percent=1.0),
    "ends": lambda: prompt(RED) + prompt(GREEN, start_percent=0.0, end_percent=0.5),
    "follows": lambda: prompt(RED, start_percent=0.0, end_percent=0.5) + prompt(GREEN, start_percent=0.5),
}


@pytest.mark.parametrize("which", IN_PART)
@pytest.mark.parametrize("strategy", [STRATEGIES[n] for n in (0, 2, 5, 6)], ids=lambda s: type(s).__name__)
def test_a_prompt_for_a_part_of_the_run_is_shared_out_among_clones(
    comfy, demo, clones, cached, reports, strategy, which
):
    latent = torch.zeros(1, 16, 8, 8)
    noise, positive = comfy.sample.prepare_noise(latent, 1), IN_PART[which]()

    def sample(model):
        return comfy.sample.sample(model, noise, 20, 3.0, "euler", "simple", positive, prompt(""), latent, seed=1)

    drawn, plain = sample(cached(clones.model, strategy)), sample(clones.model)
    report = reports.all[-1]
    assert report.count("reused", "forecast") >= 8 and 0 < relative(drawn, plain) < 0.6
    joined = sample(cached(demo.model(), strategy))
    if isinstance(
        strategy, FasterCache
    ):  # where the negative prompt is skipped, ComfyUI shares out anew who runs where
        assert relative(drawn, joined) < relative(joined, plain)
        assert computed(report, "negative") == computed(reports.all[-1], "negative")
    else:
        assert torch.allclose(drawn, joined, atol=1e-3)  # other batch sizes sum in another order
        assert computed(report) == computed(reports.all[-1])


THREE = {  # prompts of two entries, one for a part of the run
    "all": lambda: prompt(RED) + prompt(GREEN),
    "begins": lambda: prompt(RED) + prompt(GREEN, start_percent=0.5, end_percent=1.0),
    "ends": lambda: prompt(RED) + prompt(GREEN, start_percent=0.0, end_percent=0.5),
}


@pytest.mark.parametrize("which", THREE)
@pytest.mark.parametrize(
    "strategy",
    [pytest.param(STRATEGIES[n], marks=[pytest.mark.long] if n else []) for n in (0, 2, 5, 6)],
    ids=lambda s: type(s).__name__,
)
def test_three_clones_share_out_three_branches_and_decide_as_one_model_does(
    comfy, demo, three_clones, cached, reports, monkeypatch, strategy, which
):
    latent = torch.zeros(1, 16, 8, 8)
    noise, positive = comfy.sample.prepare_noise(latent, 1), THREE[which]()

    def sample(model):
        return comfy.sample.sample(model, noise, 20, 3.0, "euler", "simple", positive, prompt(""), latent, seed=1)

    counts = blocks_run(three_clones, monkeypatch)
    drawn = sample(cached(three_clones.model, strategy))
    ran, report = [counts[n] for n in range(3)], reports.all[-1]
    assert all(ran) and report.count("reused", "forecast") >= 8
    joined, of_joined = sample(cached(demo.model(), strategy)), reports.all[-1]
    if isinstance(strategy, FasterCache):  # where the negative prompt is skipped, ComfyUI shares out anew
        assert relative(drawn, joined) < relative(joined, sample(demo.model()))
        assert computed(report, "negative") == computed(of_joined, "negative")
        return
    decided = {(call.evaluation, call.action == "computed") for call in report.calls}
    assert len(decided) == 20  # all branches alike
    if which == "all":
        assert torch.allclose(drawn, joined, atol=1e-3)  # other batch sizes sum in another order
        assert computed(report) == computed(of_joined)
    else:  # a branch that moves to another clone has nothing to continue there
        plain = sample(demo.model())
        assert relative(drawn, plain) < 1.25 * relative(joined, plain)


def test_every_run_in_threads_is_the_same(sampled):
    latents = [sampled(STRATEGIES[1])[0] for _ in range(3)]
    assert all(torch.equal(latent, latents[0]) for latent in latents)


def test_each_clone_runs_its_own_branch(sampled, clones, monkeypatch):
    counts = blocks_run(clones, monkeypatch)
    _, report = sampled(STRATEGIES[0])
    computed = report.count("computed", branch="positive")
    assert counts[0] == counts[1] == computed < 10


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_clone_ends_the_run_and_leaves_nothing(sampled, clones, failing):
    calls = Counter()

    def fail(*_):
        calls["all"] += 1
        if calls["all"] == 4:
            raise RuntimeError("this card fell over")

    handle = clones.networks[failing].double_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="fell over"):
        sampled(STRATEGIES[0])
    handle.remove()
    assert not any("forward" in vars(module) for network in clones.networks for module in network.modules())
    assert sampled(STRATEGIES[0])[1].count("reused", "forecast") >= 4


@pytest.mark.parametrize("failing", [0, 1])
def test_a_clone_that_fails_with_one_prompt_leaves_no_result_of_the_other_behind(
    comfy, clones, cached, reports, failing
):
    latent, asked, failed = torch.zeros(1, 16, 8, 8), [], []
    noise = comfy.sample.prepare_noise(latent, 1)

    def count(executor, model, conds, *args):
        asked.append(sum(cond is not None for cond in conds))
        return executor(model, conds, *args)

    def fail(*_):
        if asked and asked[-1] == 1 and asked.count(1) == 2 and not failed:
            failed.append(1)
            raise IndexError("row 1")

    def sample(model):
        return comfy.sample.sample(model, noise, 20, 3.0, "euler", "simple", combined(), prompt(""), latent, seed=1)

    model = cached(clones.model, replace(PUBLISHED, spatial_attention_block_skip_range=1))
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "count", count)
    handle = clones.networks[failing].double_blocks[0].register_forward_pre_hook(fail)
    drawn = sample(model)
    handle.remove()
    assert failed and asked == [*[2] * 8, 1, 1, *[2] * 11]
    assert reports.all[-1].count("reused") == 1
    assert relative(drawn, sample(clones.model)) < 0.05


def test_nothing_of_a_run_in_threads_outlives_it(sampled, monkeypatch):
    from cache_core.adapters.comfyui import wrappers

    runs = []

    class Watched(wrappers.CacheRun):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            runs.append(weakref.ref(self))

    monkeypatch.setattr(wrappers, "CacheRun", Watched)
    sampled(STRATEGIES[0])
    gc.collect()
    assert len(runs) == 1 and runs[0]() is None
