"""Attention and guidance sites on real ComfyUI models: the demo's joint attention, and a tiny Wan's self and cross."""

from __future__ import annotations

import uuid
from collections import Counter

import pytest
import torch

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPT = "a big red ball at the center on a blue striped background"
STEPS, WIDTH, TEXT, BLOCKS = 20, 64, 12, 4
LATENT = (1, 16, 3, 8, 8)  # of the tiny Wan: (batch, channels, frames, height, width)
TOKENS = 3 * 4 * 4  # a patch is 2 by 2
ALWAYS = dict(spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=1001)
CROSS = dict(cross_attention_timestep_skip_start=-1, cross_attention_timestep_skip_end=1001)


@pytest.fixture(scope="module")
def wan(comfy):
    """A Wan of four blocks in ComfyUI's own classes, filled with random numbers."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.WAN21_T2V(
        dict(
            image_model="wan2.1", model_type="t2v", patch_size=(1, 2, 2), freq_dim=32, window_size=(-1, -1),
            qk_norm=True, cross_attn_norm=True, eps=1e-6, in_dim=16, out_dim=16, dim=WIDTH, ffn_dim=128, num_heads=4,
            num_layers=BLOCKS, text_dim=32,
        )
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.diffusion_model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


@pytest.fixture
def sample_wan(comfy, wan):
    """Sample it: twenty Euler steps on the simple scheduler at its flow shift."""
    draw = torch.Generator().manual_seed(1)
    noise, prompts = torch.randn(LATENT, generator=draw), torch.randn(2, 1, TEXT, 32, generator=draw)

    def sample(model=None, cfg=3.0, steps=STEPS):
        positive, negative = ([[prompt, {}]] for prompt in prompts)
        return comfy.sample.sample(
            model or wan, noise, steps, cfg, "euler", "simple", positive, negative, torch.zeros(LATENT), seed=0
        )

    return sample


@pytest.fixture
def wan_runs(wan, monkeypatch):
    """Rows computed by each kind of module of the tiny Wan, counted in the modules' own classes."""
    rows = Counter()
    block = wan.model.diffusion_model.blocks[0]
    for kind, module in (("self", block.self_attn), ("cross", block.cross_attn), ("block", block)):
        own = type(module).forward

        def forward(self, x, *args, _own=own, _kind=kind, **kwargs):
            rows[_kind] += len(x)
            return _own(self, x, *args, **kwargs)

        monkeypatch.setattr(type(module), "forward", forward)
    return rows


OFF = [
    FirstBlockCache(residual_diff_threshold=0.0),
    TaylorSeerCache(cache_interval=1),
    PyramidAttentionBroadcast(spatial_attention_block_skip_range=1),
    FasterCache(spatial_attention_block_skip_range=1, unconditional_batch_skip_range=1),
]


@pytest.mark.parametrize("strategy", OFF, ids=lambda strategy: type(strategy).__name__)
def test_off_settings_give_the_very_same_latent_as_no_node(wan, cached, sample_wan, strategy):
    assert torch.equal(sample_wan(cached(wan, strategy)), sample_wan())


@pytest.mark.parametrize(("spatial", "cross"), [(2, 1), (1, 3), (2, 3)])
def test_each_kind_of_attention_is_computed_as_often_as_its_range_says(
    wan, cached, reports, wan_runs, sample_wan, spatial, cross
):
    plain = sample_wan()
    wan_runs.clear()
    strategy = PyramidAttentionBroadcast(
        spatial_attention_block_skip_range=spatial, cross_attention_block_skip_range=cross, **ALWAYS, **CROSS
    )
    latent = sample_wan(cached(wan, strategy))
    all_rows = 2 * STEPS * BLOCKS
    assert wan_runs["block"] == all_rows  # the blocks themselves always run
    assert wan_runs["self"] == all_rows if spatial == 1 else all_rows / 2 <= wan_runs["self"] < 0.8 * all_rows
    assert wan_runs["cross"] == all_rows if cross == 1 else all_rows / 3 <= wan_runs["cross"] < 0.7 * all_rows
    cached_rows = [wan_runs[kind] for kind, skip_range in (("self", spatial), ("cross", cross)) if skip_range > 1]
    assert reports.all[0].computed_share == pytest.approx(sum(cached_rows) / len(cached_rows) / all_rows)
    error = ((latent - plain).norm() / plain.norm()).item()
    assert 0 < error < 0.1


def test_the_first_block_and_the_whole_output_are_cached_too(wan, cached, reports, wan_runs, sample_wan):
    for strategy in (FirstBlockCache(residual_diff_threshold=0.5), TaylorSeerCache(cache_interval=3)):
        wan_runs.clear()
        sample_wan(cached(wan, strategy))
        report = reports.all[-1]
        assert wan_runs["block"] < 0.8 * 2 * STEPS * BLOCKS
        assert report.computed_share == pytest.approx(wan_runs["block"] / (2 * STEPS * BLOCKS))


FEATURE = TOKENS * WIDTH * 4  # bytes of one attention's output for one branch
VELOCITY = 16 * 3 * 8 * 8 * 4  # bytes of the model's output for one branch


@pytest.mark.parametrize(
    ("strategy", "held"),
    [
        (PyramidAttentionBroadcast(**ALWAYS), 2 * BLOCKS * FEATURE),
        (PyramidAttentionBroadcast(cross_attention_block_skip_range=3, **ALWAYS), 2 * 2 * BLOCKS * FEATURE),
        (FasterCache(**ALWAYS), 2 * BLOCKS * 2 * FEATURE + 2 * VELOCITY),
        (FirstBlockCache(residual_diff_threshold=0.3), 2 * 2 * (FEATURE + FEATURE)),
        (FirstBlockCache(residual_diff_threshold=0.3, max_order=0), 2 * (FEATURE + FEATURE)),
        (TaylorSeerCache(cache_interval=3), 2 * 2 * VELOCITY),
        (TaylorSeerCache(cache_interval=3, max_order=2), 2 * 3 * VELOCITY),
        (TaylorSeerCache(cache_interval=3, cache_level="model"), 2 * 2 * FEATURE),
        (TaylorSeerCache(cache_interval=3, cache_level="block"), 2 * BLOCKS * 2 * FEATURE),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else f"{value}-bytes",
)
def test_the_memory_held_is_what_the_documentation_says(wan, cached, reports, sample_wan, strategy, held):
    sample_wan(cached(wan, strategy))
    assert reports.all[0].bytes_held == pytest.approx(held, rel=0.05)


def counting_calls(model):
    """A clone that counts the rows of each branch that its forward passes were given: 0 positive, 1 negative."""
    from comfy.patcher_extension import WrappersMP

    rows, counting = Counter(), model.clone()

    def count(executor, x, t, *args, **kwargs):
        options = args[3] if len(args) > 3 else kwargs["transformer_options"]
        rows.update(options["cond_or_uncond"])
        return executor(x, t, *args, **kwargs)

    counting.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    return counting, rows


@pytest.mark.parametrize("skip_range", [2, 5])
def test_the_negative_prompt_is_run_once_in_a_few_steps(demo, cached, reports, skip_range):
    strategy = FasterCache(
        spatial_attention_block_skip_range=1,
        unconditional_batch_skip_range=skip_range,
        unconditional_batch_timestep_skip_end=1001,
    )
    plain = demo.sample(demo.model(), [PROMPT])
    model, rows = counting_calls(cached(demo.model(), strategy))
    latent = demo.sample(model, [PROMPT])
    assert rows[0] == STEPS
    assert rows[1] == -(-STEPS // skip_range)  # an even schedule: every so many steps, from the first on
    (report,) = reports.all
    assert report.count("reused", branch="negative") == STEPS - rows[1]
    assert report.count("computed", branch="positive") == STEPS
    assert report.computed_share == pytest.approx((rows[0] + rows[1]) / (2 * STEPS))
    assert 0 < ((latent - plain).norm() / plain.norm()).item() < 0.25


def test_the_negative_prompt_of_a_video_is_skipped_too(wan, cached, reports, sample_wan):
    model, rows = counting_calls(cached(wan, FasterCache(unconditional_batch_timestep_skip_end=1001)))
    latent, plain = sample_wan(model), sample_wan()
    assert rows[0] == STEPS and rows[1] < 0.6 * STEPS
    assert reports.all[0].count("reused", branch="negative") == STEPS - rows[1]
    assert 0 < ((latent - plain).norm() / plain.norm()).item() < 0.25  # noise draws nothing smooth


def test_at_cfg_1_only_the_attention_is_cached_and_the_report_says_so(demo, cached, reports):
    demo.sample(cached(demo.model(), FasterCache()), [PROMPT], cfg=1.0)
    (report,) = reports.all
    assert any("with a distilled model, the negative prompt is not run" in note for note in report.notes)
    assert report.count("reused", "forecast", branch="positive") >= 5
    assert report.count("computed", "reused", "forecast", branch="negative") == 0


@pytest.mark.parametrize("changed", ["uuid", "shape"])
def test_another_prompt_is_never_estimated_from_the_last_one(demo, comfy, changed):
    """The key of the branch without a prompt: its entries, the window, the shape, the model."""
    from cache_core.adapters.comfyui.contexts import prompts_at

    entry, sigma = {"uuid": uuid.uuid4()}, torch.tensor([0.5])
    other = {"uuid": uuid.uuid4()}
    assert prompts_at([[entry], [other]], sigma) != prompts_at([[entry], [{"uuid": uuid.uuid4()}]], sigma)
    late = other | {"timestep_start": 0.4}
    assert prompts_at([[entry], [late]], sigma) == ((entry["uuid"],), ())
    assert prompts_at([[entry], [late]], torch.tensor([0.3])) == ((entry["uuid"],), (other["uuid"],))


@pytest.mark.parametrize(
    "strategy",
    [
        PyramidAttentionBroadcast(**ALWAYS),
        FasterCache(unconditional_batch_skip_range=5, unconditional_batch_timestep_skip_end=641, **ALWAYS),
    ],
    ids=lambda s: s.title,
)
def test_another_nodes_override_of_attention_still_computes_what_is_computed(demo, cached, reports, strategy):
    """Joint attention of Flux is an operation, no module; a node that replaced it keeps its effect."""
    asked = Counter()

    def counting(function, *args, **kwargs):
        asked["operations"] += 1
        return function(*args, **kwargs)

    def doubling(function, *args, **kwargs):
        return 2 * function(*args, **kwargs)

    def overridden(override):
        model = demo.model().clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    with_ours = demo.sample(cached(overridden(counting), strategy), [PROMPT])
    assert 0 < asked["operations"] < 0.9 * 6 * STEPS  # 6 blocks, both branches in one batch
    assert torch.equal(with_ours, demo.sample(cached(demo.model(), strategy), [PROMPT]))
    effect = demo.sample(overridden(doubling), [PROMPT])
    kept = demo.sample(cached(overridden(doubling), strategy), [PROMPT])
    assert (kept - effect).norm() < 0.3 * (demo.sample(demo.model(), [PROMPT]) - effect).norm()


def test_first_block_cache_and_faster_cache_work_in_series(demo, cached, reports):
    plain = demo.sample(demo.model(), [PROMPT])
    model = cached(cached(demo.model(), FirstBlockCache(residual_diff_threshold=0.3)), FasterCache())
    latent = demo.sample(model, [PROMPT])
    (report,) = reports.all
    alone = demo.sample(cached(demo.model(), FirstBlockCache(residual_diff_threshold=0.3)), [PROMPT])
    assert [strategy.title for strategy in report.strategies] == ["First Block Cache", "FasterCache"]
    assert report.count("reused", branch="negative") > 0
    assert not torch.equal(latent, alone)
    assert 0 < ((latent - plain).norm() / plain.norm()).item() < 0.3
