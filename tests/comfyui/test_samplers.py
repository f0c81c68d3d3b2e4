"""Every sampler and scheduler of KSampler, schedules given in parts, and two experts, on the demo model."""

from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from cache_core.compare.quality import psnr
from cache_core.demo.codec import FLUX_SCALE, FLUX_SHIFT, decode
from cache_core.run.call import ModelCall
from cache_core.run.path import LatentPath
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import NOISE_IS_ADDED, TaylorSeerCache
from cache_core.strategy.step import SAME_SIGMA, Schedule

STEPS = 12
DEFAULTS = [FirstBlockCache(), TaylorSeerCache(), PyramidAttentionBroadcast(), FasterCache()]
OFF = [FirstBlockCache(residual_diff_threshold=0.0), TaylorSeerCache(cache_interval=1)]
NEVER_MET = [  # everything is measured and kept, nothing reused
    FirstBlockCache(residual_diff_threshold=1e-9),
    FasterCache(spatial_attention_timestep_skip_end=0, unconditional_batch_timestep_skip_end=0),
]
CHOSEN = ["heun", "dpm_adaptive", "dpmpp_2m_sde", "uni_pc", "seeds_2"]  # one of each kind, for the runs that are short
MANY = ["euler", "dpmpp_2m_sde"]  # for all schedulers
NOISELESS = ["euler", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2", "dpm_fast", "dpm_adaptive", "dpmpp_2m", "deis"]
NOISELESS += ["res_multistep", "uni_pc", "uni_pc_bh2", "ddim"]
ADDING_NOISE = ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde"]
ADDING_NOISE += ["dpmpp_2m_sde_heun", "dpmpp_3m_sde", "ddpm", "lcm", "res_multistep_ancestral", "er_sde", "seeds_2"]
ADDING_NOISE += ["seeds_3", "sa_solver", "sa_solver_pece", "exp_heun_2_x0_sde"]


def pytest_generate_tests(metafunc):
    """All samplers with one scheduler, and all schedulers with two samplers, as this ComfyUI has them."""
    if "combination" in metafunc.fixturenames:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.samplers

        samplers, schedulers = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
        all_of_them = [(sampler, "simple") for sampler in samplers] + [(s, c) for s in MANY for c in schedulers]
        metafunc.parametrize("combination", dict.fromkeys(all_of_them), ids="-".join)


@pytest.fixture
def run(demo, cached, reports, scenes):
    """Sample one scene; with a strategy also its report, and how often the sampler asked for a noise prediction."""
    from comfy.patcher_extension import WrappersMP

    def sample(*strategies, model=None, **options):
        asked, model = [], (model or demo.model()).clone()
        model.add_wrapper_with_key(
            WrappersMP.PREDICT_NOISE,
            "count",
            lambda executor, x, sigma, *args: (asked.append(sigma.max().item()), executor(x, sigma, *args))[1],
        )
        for strategy in strategies:
            model = cached(model, strategy)
        latent = demo.sample(model, scenes(1), **{"steps": STEPS, **options})
        return SimpleNamespace(latent=latent, asked=asked, report=reports.all[-1] if strategies else None)

    return sample


def sigmas_of(comfy, model, sampler, scheduler, steps=STEPS):
    return comfy.samplers.KSampler(model, steps, "cpu", sampler, scheduler).sigmas.tolist()


def planned_by_hand(strategy, schedule, sigmas, anew):
    """For each evaluation of the sampler, whether TaylorSeer computes it: planned or overdue, not at this sigma yet.

    At the one with the index `anew` there is nothing to reuse.
    """
    computed, last, at, planned = [], None, -1, strategy.computed_steps(schedule)
    for index, sigma in enumerate(sigmas):
        if index == anew:
            last = None
        step = schedule.step_at(sigma).index
        is_planned = step in planned or any(at < missed < step for missed in planned)
        is_known = last is not None and abs(last - sigma) <= SAME_SIGMA * sigma
        computed.append(last is None or (is_planned and not is_known))
        last, at = (sigma, step) if computed[-1] else (last, at)
    return computed


def check_reuse(strategy, report, schedule, sigmas):
    """Reuse is only where the plan allows it."""
    report.close()
    reusing = [call for call in report.calls if call.action != "computed"]
    first = {call.evaluation for call in report.calls if call.evaluation == 1}
    assert first and all(call.action == "computed" for call in report.calls if call.evaluation in first)
    if isinstance(strategy, TaylorSeerCache):
        actions = {call.evaluation: call.action == "computed" for call in report.calls}
        seen_at = range(len(sigmas)) if NOISE_IS_ADDED in report.notes else [0]  # from then on something else is kept
        planned = [planned_by_hand(strategy, schedule, sigmas, anew) for anew in seen_at]
        assert list(actions.values()) in planned and reusing
    elif isinstance(strategy, FirstBlockCache):
        assert all(call.measure < strategy.residual_diff_threshold for call in reusing)
    elif isinstance(strategy, PyramidAttentionBroadcast):
        assert all(100 < call.step.timestep < 800 for call in reusing)
    else:
        assert all(call.step.timestep < 950 for call in reusing)


def check(comfy, demo, run, combination):
    sampler, scheduler = combination
    options, schedule = dict(zip(("sampler", "scheduler"), combination)), None
    plain = run(**options)
    for strategies in (OFF, NEVER_MET):
        assert torch.equal(run(*strategies, **options).latent, plain.latent)
    schedule = Schedule(sigmas_of(comfy, demo.model(), sampler, scheduler))
    for strategy in DEFAULTS:
        result = run(strategy, **options)
        assert torch.isfinite(result.latent).all()
        assert {call.evaluation for call in result.report.calls} == set(range(1, len(result.asked) + 1))
        assert result.report.steps == schedule.count
        assert len(result.asked) == len(plain.asked) or sampler == "dpm_adaptive"  # its steps follow the errors it sees
        check_reuse(strategy, result.report, schedule, result.asked)


@pytest.mark.long
def test_every_sampler_and_scheduler_samples_to_the_plan(comfy, demo, run, combination):
    check(comfy, demo, run, combination)


@pytest.mark.parametrize("sampler", CHOSEN)
def test_a_sampler_of_each_kind_samples_to_the_plan(comfy, demo, run, sampler):
    check(comfy, demo, run, (sampler, "simple"))


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "seeds_3"])
def test_evaluations_are_counted_not_steps(run, sampler):
    result = run(TaylorSeerCache(), sampler=sampler)
    assert result.report.steps == STEPS < 1.9 * STEPS < len(result.asked) == len(result.report.calls)
    assert f"{len(result.asked)} model calls" in result.report.line()


@pytest.mark.long
@pytest.mark.parametrize("scheduler", ["simple", "karras"])
def test_noise_is_seen_with_exactly_the_samplers_that_add_it(run, comfy, scheduler):
    """Left out are those that may seem to: cfg_pp (they step along another prediction than the guided one), and lms,
    ipndm and gradient_estimation (they overshoot late or on long steps).
    """
    known = [sampler for sampler in (*ADDING_NOISE, *NOISELESS) if sampler in comfy.samplers.KSampler.SAMPLERS]
    found = [s for s in known if NOISE_IS_ADDED in run(TaylorSeerCache(), sampler=s, scheduler=scheduler).report.notes]
    assert found == [sampler for sampler in known if sampler in ADDING_NOISE] and len(found) >= 12


@pytest.mark.parametrize(("sampler", "adds_noise"), [("euler", False), ("euler_ancestral", True), ("uni_pc", False)])
def test_noise_is_seen_where_it_is_added(run, sampler, adds_noise):
    result = run(TaylorSeerCache(cache_interval=3), sampler=sampler)
    assert (NOISE_IS_ADDED in result.report.notes) == adds_noise
    assert (result.report.count("forecast") > 0) != adds_noise and result.report.count("forecast", "reused") >= 6


def test_an_ancestral_sampler_that_is_set_to_add_no_noise_counts_as_what_it_does(demo, comfy, cached, reports):
    import comfy.k_diffusion.sampling

    sampler = comfy.samplers.ksampler("euler_ancestral", {"eta": 0.0})
    model = cached(demo.model(), TaylorSeerCache())
    sample_custom(comfy, model, sampler, sigmas_of(comfy, model, "euler", "simple"))
    assert not reports.all[0].notes and reports.all[0].count("forecast") > 0


def sample_custom(comfy, model, sampler, sigmas, latent=None, seed=1, prompt=0.0):
    """What SamplerCustomAdvanced does with a CFG guider; without noise of its own if a latent is given."""
    draw = torch.Generator().manual_seed(7)
    tokens, pooled = torch.randn(1, 8, 96, generator=draw), torch.randn(1, 96, generator=draw)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[tokens, {"pooled_output": pooled}]], [[0 * tokens, {"pooled_output": 0 * pooled}]])
    guider.set_cfg(3.0)
    shape = (1, 16, 8, 8)
    noise = torch.zeros(shape) if latent is not None else comfy.sample.prepare_noise(torch.zeros(shape), seed)
    start = torch.zeros(shape) if latent is None else latent
    return guider.sample(noise, start, sampler, torch.tensor(sigmas), disable_pbar=True, seed=seed)


@pytest.fixture
def closeness(demo, scenes):
    """Of pictures to the uncached ones, in decibels, and the report; eight scenes in one batch."""
    plain, prompts = {}, scenes(8)

    def pictures(model, options):
        latent = demo.sample(model, prompts, **options)
        return decode((latent - FLUX_SHIFT) * FLUX_SCALE)

    def measured(model, uncached=None, steps=20, **options):
        key = (uncached, *options.items())
        if key not in plain:
            plain[key] = pictures(uncached or demo.model(), options)
        return median(map(psnr, pictures(model, {**options, "steps": steps}), plain[key]))

    return measured


@pytest.mark.long
@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde"])
def test_the_rule_for_samplers_that_add_noise_is_better_than_none(demo, cached, closeness, monkeypatch, sampler):
    """At the same computed steps: first without any rule, then with the denoised latent kept, then no trend either."""
    model = cached(demo.model(), TaylorSeerCache(cache_interval=4))
    with monkeypatch.context() as patch:
        patch.setattr(LatentPath, "notice_noise", lambda self: False)
        no_rule = closeness(model, sampler=sampler)
        patch.setattr(ModelCall, "_keeps_denoised", lambda self: True)
        no_trend_rule = closeness(model, sampler=sampler)
    rule = closeness(model, sampler=sampler)
    assert no_rule + 2 <= no_trend_rule and no_trend_rule + 3 <= rule


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_without_noise_the_models_own_output_is_kept(demo, comfy, cached, closeness, monkeypatch, sampler):
    """CFG-Zero* weighs the prompts by their latents' distance to the denoised ones, and small errors there count."""
    from comfy_extras.nodes_cfg import CFGZeroStar

    (guided,) = CFGZeroStar.execute(demo.model()).args
    model = cached(guided, TaylorSeerCache(cache_interval=2))
    own = closeness(model, uncached=guided, sampler=sampler)
    monkeypatch.setattr(ModelCall, "_keeps_denoised", lambda self: True)
    assert own >= closeness(model, uncached=guided, sampler=sampler) + 5


@pytest.mark.long
@pytest.mark.parametrize(("shift", "spacing"), [(1, "steps"), (3, "sigma")])
def test_a_planned_step_of_heun_is_computed_once_and_no_worse(
    demo, cached, closeness, reports, monkeypatch, shift, spacing
):
    """The corrector's evaluation comes at a sigma that the predictor's computed: half the work for the same picture."""
    model, strategy = demo.shifted(demo.model(), shift), TaylorSeerCache(cache_interval=2, spacing=spacing)
    plain = demo.shifted(demo.model(), shift)
    once, fewer = closeness(cached(model, strategy), sampler="heun"), closeness(plain, sampler="heun", steps=6)
    assert reports.all[0].computed_share < 0.3
    monkeypatch.setattr("cache_core.strategy.forecast.History.has", lambda self, node: False)
    twice = closeness(cached(model, strategy), sampler="heun")
    assert reports.all[1].computed_share > 0.5
    assert once >= twice - 2 and once >= fewer + 5


@pytest.mark.parametrize("strategy", [*DEFAULTS, TaylorSeerCache(cache_level="model")], ids=lambda s: s.title)
@pytest.mark.parametrize("way", ["KSamplerAdvanced", "SplitSigmas"])
def test_a_schedule_given_in_two_parts_is_two_runs(demo, comfy, cached, reports, scenes, way, strategy):
    def in_parts(model):
        if way == "SplitSigmas":
            sigmas = sigmas_of(comfy, model, "euler", "simple", 20)
            sampler = comfy.samplers.sampler_object("euler")
            half = sample_custom(comfy, model, sampler, sigmas[:10])
            return sample_custom(comfy, model, sampler, sigmas[9:], latent=half)
        half = demo.sample(model, scenes(1), start_step=0, last_step=9)
        return demo.sample(model, scenes(1), latent=half, start_step=9, disable_noise=True)

    off = [replace(strategy, **({"cache_interval": 1} if isinstance(strategy, TaylorSeerCache) else {}))]
    plain = in_parts(demo.model())
    if isinstance(strategy, TaylorSeerCache):
        assert torch.equal(in_parts(cached(demo.model(), *off)), plain)
        reports.all.clear()
    latent = in_parts(cached(demo.model(), strategy))
    first, second = reports.all
    assert (first.steps, second.steps) == (9, 11)
    assert all(report.calls[0].action == "computed" for report in reports.all)
    assert all(0 <= call.step.index < report.steps for report in reports.all for call in report.calls)
    assert sum(report.count("reused", "forecast") for report in reports.all) >= 4
    assert 0 < ((latent - plain).norm() / plain.norm()).item() < 0.3


@pytest.mark.parametrize("strategy", DEFAULTS, ids=lambda s: s.title)
def test_a_part_of_a_latent_and_a_part_of_the_noise_are_sampled(demo, cached, reports, scenes, strategy):
    """Denoise 0.5, within a mask."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    latent = demo.sample(demo.model(), scenes(1))
    options = dict(latent=latent, denoise=0.5, noise_mask=mask, seed=3)
    plain, off = (demo.sample(model, scenes(1), **options) for model in (demo.model(), cached(demo.model(), OFF[0])))
    assert torch.equal(plain, off)
    result = demo.sample(cached(demo.model(), strategy), scenes(1), **options)
    report = reports.all[-1]
    assert report.count("reused", "forecast") >= 3 and report.notes == []
    assert torch.allclose(result[..., :4], latent[..., :4], atol=1e-4)
    assert 0 < ((result - plain).norm() / plain.norm()).item() < 0.3


def test_a_shift_node_before_or_after_the_cache_is_the_same(demo, cached, reports, scenes):
    before = demo.sample(cached(demo.shifted(demo.model(), 3), FirstBlockCache(residual_diff_threshold=0.3)), scenes(1))
    after = demo.sample(demo.shifted(cached(demo.model(), FirstBlockCache(residual_diff_threshold=0.3)), 3), scenes(1))
    assert torch.equal(before, after) and reports.all[0].count("forecast", "reused") >= 8
    reports.all[0].close()
    assert reports.all[0].calls[10].step.sigma == pytest.approx(0.75)  # half of the noise, at shift 3


@pytest.mark.parametrize("strategy", [*DEFAULTS, TaylorSeerCache(cache_level="block")], ids=lambda s: s.title)
def test_two_experts_share_settings_and_nothing_else(demo, cached, reports, scenes, strategy):
    """One strategy on two MODELs, as high- and low-noise experts have it, sampled in turns: each run stands alone."""
    from cache_core.adapters.comfyui import demo as loading

    def experts(model, expert):
        half = demo.sample(model, scenes(1), start_step=0, last_step=9)
        return half, demo.sample(expert, scenes(1), latent=half, start_step=9, disable_noise=True)

    low = loading.load_model()
    with torch.no_grad():
        for parameter in low.model.diffusion_model.single_blocks.parameters():
            parameter.mul_(0.9)  # another model
    one_by_one = experts(cached(demo.model(), strategy), cached(low, replace(strategy)))
    assert sum(report.count("reused", "forecast") for report in reports.all) >= 4
    shared = experts(cached(demo.model(), strategy), cached(low, strategy))
    again = experts(cached(demo.model(), strategy), cached(low, strategy))
    assert all(map(torch.equal, one_by_one, shared)) and all(map(torch.equal, shared, again))
    plain = experts(demo.model(), low)
    assert 0 < ((shared[1] - plain[1]).norm() / plain[1].norm()).item() < 0.3
