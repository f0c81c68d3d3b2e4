"""Prompts of several parts, ranges, hooks, ControlNets, guiders of other shapes, batches: on the demo model."""

from collections import Counter

import pytest
import torch

from cache_core.demo import words
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

STEPS = 16
WITHOUT_NEGATIVE = dict(
    spatial_attention_block_skip_range=1, unconditional_batch_skip_range=5, unconditional_batch_timestep_skip_end=1001
)
NEVER_MET = [
    FirstBlockCache(residual_diff_threshold=1e-9),
    FasterCache(spatial_attention_timestep_skip_end=0, unconditional_batch_timestep_skip_end=0),
]
ON = [
    FirstBlockCache(residual_diff_threshold=0.3),
    TaylorSeerCache(cache_interval=3),
    TaylorSeerCache(cache_interval=3, cache_level="block"),
    PyramidAttentionBroadcast(),
    FasterCache(),
]


def prompt(text, **extras):
    tokens, pooled = words.encode(text)
    return [[tokens[None], {"pooled_output": pooled[None], **extras}]]


RED = "a big red ball at the center on a blue striped background"
GREEN = "a small green box at the left on a white plain background"


def combined():
    return prompt(RED) + prompt(GREEN)


def areas():
    return prompt(RED, area=(8, 4, 0, 0), strength=1.0) + prompt(GREEN, area=(8, 4, 0, 4), strength=1.0)


def masks():
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    both = [(RED, left), (GREEN, 1 - left)]
    return [part for text, mask in both for part in prompt(text, mask=mask, mask_strength=1.0)]


def ranges():
    return prompt(RED, start_percent=0.0, end_percent=0.5) + prompt(GREEN, start_percent=0.5, end_percent=1.0)


def defaults():
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    return prompt(RED, mask=left, mask_strength=1.0) + prompt(GREEN, default=True)


def lora_hooks():
    """A LoRA that is put on in the middle of the sampling."""
    import comfy.hooks

    draw = torch.Generator().manual_seed(3)
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    down = torch.randn(4, 256, generator=draw) / 16
    lora = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.randn(256, 4, generator=draw) / 2}
    group, keyframes = comfy.hooks.create_hook_lora(lora, 1.0, 1.0), comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.55, guarantee_steps=0))
    group.set_keyframes_on_hooks(keyframes)
    return comfy.hooks.set_hooks_for_conditioning(prompt(RED), group)


def controlnet(start=0.0, end=1.0):
    """A ControlNet whose signal is the same at every step, on for a range."""
    import comfy.controlnet

    class Signal(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            if not self.timestep_range[1] <= t[0] <= self.timestep_range[0]:
                return None
            draw = torch.Generator().manual_seed(5)
            return {"input": [0.5 * torch.randn(1, 16, 256, generator=draw)], "output": []}

        def get_models(self):
            return []

        def copy(self):
            return self

    return Signal().set_cond_hint(None, timestep_percent_range=(start, end))


def controls():
    return prompt(RED, control=controlnet(0.0, 0.55), control_apply_to_uncond=True)


def reference_latents():
    return prompt(RED, reference_latents=[torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))])


# How far off caches may be: two scenes in one, or one after the other, turn on little (without any cache, eight of the
# sixteen steps give 0.35 and 0.29; of one scene 0.1). That each part is given its own is tested to the bit.
MOST_ERROR = {combined: 0.8, ranges: 0.6}
PROMPTS = [combined, areas, masks, ranges, defaults, lora_hooks, controls, reference_latents]


@pytest.fixture
def sample(demo, comfy):
    def sample(model=None, positive=None, negative=None, cfg=3.0, batch=1, steps=STEPS, size=8, seed=1):
        latent = torch.zeros(batch, 16, size, 8)
        noise = comfy.sample.prepare_noise(latent, seed)
        positive, negative = positive or prompt(RED), prompt("") if negative is None else negative
        return comfy.sample.sample(
            model or demo.model(), noise, steps, cfg, "euler", "simple", positive, negative, latent, seed=seed
        )

    return sample


def relative(some, other):
    return ((some - other).norm() / other.norm()).item()


def named(function):
    return function.__name__


@pytest.mark.parametrize("make", PROMPTS, ids=named)
def test_every_part_of_a_prompt_is_given_back_its_own(demo, cached, sample, witnessed, make):
    model, seen = witnessed(demo.model())
    sample(cached(model, TaylorSeerCache(cache_interval=3, max_order=0)), make())
    assert seen.wrong == [] and seen.computed >= 10 and seen.replayed >= STEPS


@pytest.mark.parametrize("make", PROMPTS, ids=named)
def test_caches_that_never_reuse_give_the_very_same_latent(demo, cached, sample, make):
    positive = make()
    plain = sample(positive=positive)
    assert torch.equal(sample(cached(cached(demo.model(), NEVER_MET[0]), NEVER_MET[1]), positive), plain)
    assert relative(plain, sample()) > 0.01  # the prompt does something


@pytest.mark.long
@pytest.mark.parametrize("make", PROMPTS, ids=named)
def test_caches_reuse_and_stay_close_with_any_prompt(demo, cached, reports, sample, make):
    positive = make()
    plain = sample(positive=positive)
    for strategy in ON:
        latent = sample(cached(demo.model(), strategy), positive)
        report = reports.all[-1]
        assert report.computed_share < 0.95 and report.count("reused", "forecast") > 0, strategy.title
        assert 0 < relative(latent, plain) < MOST_ERROR.get(make, 0.3), strategy.title


def evaluations_of_the_negative(demo, cached, sample, positive):
    from comfy.patcher_extension import WrappersMP

    sigmas, model = [], demo.model().clone()

    def note(executor, x, t, *args, **kwargs):
        sigmas.extend([round(t[0].item(), 4)] if 1 in args[3]["cond_or_uncond"] else [])
        return executor(x, t, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "note", note)
    sample(cached(model, FasterCache(**WITHOUT_NEGATIVE)), positive, steps=20)
    return sigmas


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.33), (0.33, 1.0)], ids=["stops", "starts"])
def test_a_controlnet_that_starts_or_stops_makes_faster_cache_run_the_negative_prompt(demo, cached, sample, start, end):
    """What the prompts differed by with the ControlNet says nothing of what they differ by without it."""
    always = evaluations_of_the_negative(demo, cached, sample, prompt(RED, control=controlnet()))
    assert always == [1.0, 0.75, 0.5, 0.25]
    changing = prompt(RED, control=controlnet(start, end), control_apply_to_uncond=True)
    assert evaluations_of_the_negative(demo, cached, sample, changing) == [1.0, 0.75, 0.65, 0.4, 0.15]


def unplanned(report):
    """The steps that were computed because a branch was another than before."""
    report.close()
    return {call.step.index for call in report.calls if call.reason == "nothing to reuse yet" and call.step.index}


def test_of_two_controlnets_one_that_stops_makes_its_branch_compute(demo, cached, reports, sample):
    first, second = controlnet(0.0, 0.28), controlnet()
    second.set_previous_controlnet(first)
    sample(cached(demo.model(), TaylorSeerCache(cache_interval=5)), prompt(RED, control=second), steps=20)
    assert unplanned(reports.all[0]) == {6}  # at sigma 0.7


def test_a_keyframe_of_a_lora_makes_its_branch_compute(demo, cached, reports, sample):
    sample(cached(demo.model(), TaylorSeerCache(cache_interval=5)), lora_hooks(), steps=20)
    assert unplanned(reports.all[0]) == {11}  # at sigma 0.45


def guide(demo, comfy, kind, model, cfg=3.0):
    """What the guider nodes make: a guider of three branches."""
    import comfy_extras.nodes_custom_sampler as custom
    import comfy_extras.nodes_perpneg as perpneg

    red, green, empty = prompt(RED), prompt(GREEN), prompt("")
    if kind == "PerpNeg":
        guider = perpneg.Guider_PerpNeg(model)
        guider.set_conds(red, green, empty)
        guider.set_cfg(cfg, 1.0)
    elif kind == "BasicGuider":
        guider = custom.Guider_Basic(model)
        guider.set_conds(red)
    else:
        guider = custom.Guider_DualCFG(model)
        guider.set_conds(red, green, empty)
        guider.set_cfg(cfg, cfg, nested=kind == "DualCFG nested")
    latent = torch.zeros(1, 16, 8, 8)
    sigmas = comfy.samplers.KSampler(model, STEPS, "cpu", "euler", "simple").sigmas
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(comfy.sample.prepare_noise(latent, 1), latent, sampler, sigmas, disable_pbar=True, seed=1)


@pytest.mark.parametrize("kind", ["PerpNeg", "DualCFG", "DualCFG nested", "BasicGuider"])
def test_guiders_of_one_or_three_branches_are_cached_branch_by_branch(demo, comfy, cached, reports, witnessed, kind):
    plain = guide(demo, comfy, kind, demo.model())
    assert torch.equal(guide(demo, comfy, kind, cached(demo.model(), NEVER_MET[1])), plain)
    model, seen = witnessed(demo.model())
    guide(demo, comfy, kind, cached(model, TaylorSeerCache(cache_interval=3, max_order=0)))
    branches = 1 if kind == "BasicGuider" else 3
    assert seen.wrong == [] and len(seen.kept) == branches and seen.replayed >= branches * STEPS / 2
    for strategy in ON:
        latent = guide(demo, comfy, kind, cached(demo.model(), strategy))
        assert reports.all[-1].count("reused", "forecast") > 0 and 0 < relative(latent, plain) < 0.4
    notes = " ".join(reports.all[-1].notes)
    assert ("this guider has 3 branches" if branches == 3 else "where cfg is 1") in notes and "1 branches" not in notes


def test_cfg_zero_star_and_a_guidance_that_looks_twice(demo, cached, reports, sample):
    """ComfyUI's node, and a function before the guidance that calls the positive prompt again (as SLG does)."""
    from comfy.samplers import calc_cond_batch
    from comfy_extras.nodes_cfg import CFGZeroStar

    def with_guidance(model):
        (guided,) = CFGZeroStar.execute(model).args

        def again(given):
            (other,) = calc_cond_batch(
                given["model"], [given["conds"][0]], 0.9 * given["input"], given["timestep"], given["model_options"]
            )
            return [given["conds_out"][0] * 1.5 - other * 0.5, given["conds_out"][1]]

        guided.set_model_sampler_pre_cfg_function(again)
        return guided

    plain = sample(with_guidance(demo.model()))
    assert torch.equal(sample(with_guidance(cached(demo.model(), NEVER_MET[0]))), plain)
    for strategy in ON:
        latent = sample(with_guidance(cached(demo.model(), strategy)))
        assert reports.all[-1].count("reused", "forecast") > 0 and 0 < relative(latent, plain) < 0.4


@pytest.mark.parametrize("negative", [None, []], ids=["a negative prompt at cfg 1", "no negative prompt at all"])
def test_without_a_negative_prompt_the_positive_is_cached(demo, cached, reports, sample, negative):
    plain = sample(cfg=1.0, negative=negative)
    assert torch.equal(sample(cached(demo.model(), NEVER_MET[1]), cfg=1.0, negative=negative), plain)
    for strategy in ON:
        latent = sample(cached(demo.model(), strategy), cfg=1.0, negative=negative)
        assert reports.all[-1].count("reused", "forecast", branch="positive") > 0
        assert reports.all[-1].count("reused", "forecast", "computed", branch="negative") == 0
        assert 0 < relative(latent, plain) < 0.3


@pytest.mark.long
@pytest.mark.parametrize("strategy", [TaylorSeerCache(cache_interval=3), *ON[3:]], ids=lambda s: s.title)
def test_pictures_of_a_batch_are_as_when_sampled_alone(demo, comfy, cached, reports, sample, strategy):
    """Planned reuse is the same for all rows. First Block Cache decides by the most changed row of a batch."""
    for batch in (2, 3, 4):
        together = sample(cached(demo.model(), strategy), batch=batch)
        assert reports.all[-1].count("reused", "forecast") > 0
        first = sample(cached(demo.model(), strategy), batch=1)
        assert torch.allclose(together[:1], first, atol=1e-3) and not torch.allclose(together[1:2], first, atol=1e-1)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ON, ids=lambda s: f"{s.title} {s.levels[0]}")
def test_another_size_after_the_first_is_a_run_of_its_own(demo, cached, sample, strategy):
    model = cached(demo.model(), strategy)
    alone = {size: sample(cached(demo.model(), strategy), size=size) for size in (8, 12)}
    for size in (8, 12, 8):
        assert torch.equal(sample(model, size=size), alone[size])


@pytest.mark.parametrize(
    "strategy", [FasterCache(), PyramidAttentionBroadcast(), FirstBlockCache()], ids=lambda s: s.title
)
def test_branches_split_joined_or_changing_decide_and_draw_alike(demo, cached, reports, sample, monkeypatch, strategy):
    """What ComfyUI decides by free memory, from step to step."""
    base, own, decisions, latents = type(demo.model().model), type(demo.model().model).memory_required, {}, {}
    for how in ("joined", "split", "changing"):
        evaluations = Counter()

        def needed(self, shape, *args, _how=how, _counted=evaluations, **kwargs):
            _counted["joined"] += shape[0] > 1
            too_much = _how == "split" or (_how == "changing" and _counted["joined"] // 3 % 2)
            return float("inf") if too_much and shape[0] > 1 else own(self, shape, *args, **kwargs)

        monkeypatch.setattr(base, "memory_required", needed)
        latents[how] = sample(cached(demo.model(), strategy))
        report = reports.all[-1]
        report.close()
        decisions[how] = {(c.step.index, b): (c.action, c.computed_share) for c in report.calls for b in c.branches}
    sizes = {len(call.branches) for call in reports.all[-1].calls}
    assert sizes == {1, 2} and decisions["joined"] == decisions["split"] == decisions["changing"]
    assert {action for action, _ in decisions["split"].values()} > {"computed"}
    for how in ("split", "changing"):  # other batch sizes sum in another order
        assert torch.allclose(latents[how], latents["joined"], atol=1e-4)
