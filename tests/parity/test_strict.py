"""strict_parity against diffusers' own hooks: each model, each strategy, twenty steps, bit for bit."""

from __future__ import annotations

import pytest
import torch
from models import (
    CHROMA,
    COGVIDEOX,
    COGVIEW4,
    DENOISERS,
    FLUX,
    FLUX2,
    HUNYUAN_VIDEO,
    LATTE,
    LTX,
    MOCHI,
    QWEN_IMAGE,
    SD3,
    WAN,
    WAN_JOINED,
    Clock,
    denoise,
    diffusers,
    made,
    without_context,
)
from recording import recorded, recorded_both

WINDOW = (100, 850)
ATTENTION = [r".*blocks\.\d+\.attn1?$"]
FEED_FORWARDS = [r".*blocks\.\d+\.(ff|ffn|ff_context|img_mlp|txt_mlp|proj_mlp)$"]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
ALL = [*DENOISERS, LATTE, FLUX2, SD3]
FORMATS = {"CogVideoX": "BFCHW", "Wan": "BCFHW", "WanJoined": "BCFHW", "HunyuanVideo": "BCFHW", "Mochi": "BCFHW"}
FORMATS |= {"Latte": "BCFHW"}
THRESHOLDS = {  # at which the tiny model reuses some steps and computes others
    "Flux": 0.3,
    "CogVideoX": 0.2,
    "Wan": 0.1,
    "HunyuanVideo": 0.3,
    "LTX": 0.1,
    "Mochi": 0.25,
    "QwenImage": 0.4,
    "CogView4": 0.2,
    "WanJoined": 0.1,
}


def named(value):
    return value.name if hasattr(value, "inputs") else str(value).removeprefix("torch.")


def first_block(threshold=None):
    def new_config(denoiser, clock):
        chosen = THRESHOLDS[denoiser.name] if threshold is None else threshold
        return diffusers.FirstBlockCacheConfig(threshold=chosen)

    return new_config


def taylorseer(**settings):
    return lambda denoiser, clock: diffusers.TaylorSeerCacheConfig(**settings)


def broadcast(**settings):
    def new_config(denoiser, clock):
        return diffusers.PyramidAttentionBroadcastConfig(**{"current_timestep_callback": clock} | settings)

    return new_config


def faster_cache(**settings):
    def new_config(denoiser, clock):
        layout = FORMATS.get(denoiser.name, "BCHW")
        return diffusers.FasterCacheConfig(**{"tensor_format": layout, "current_timestep_callback": clock} | settings)

    return new_config


SPATIAL = dict(spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=WINDOW)
CROSS = dict(cross_attention_block_skip_range=3, cross_attention_timestep_skip_range=WINDOW)
TEMPORAL = dict(temporal_attention_block_skip_range=3, temporal_attention_timestep_skip_range=WINDOW)
DISTILLED = dict(is_guidance_distilled=True, spatial_attention_timestep_skip_range=(-1, 850))
GUIDED = dict(unconditional_batch_skip_range=3, unconditional_batch_timestep_skip_range=(-1, 800))
GUIDED |= dict(spatial_attention_timestep_skip_range=(-1, 850))
FORECAST = dict(cache_interval=4, cache_identifiers=ATTENTION)

STRATEGIES = {
    "FirstBlock": first_block(),
    "TaylorSeer order 1": taylorseer(**FORECAST),
    "TaylorSeer order 2": taylorseer(**FORECAST, max_order=2, taylor_factors_dtype=FLOAT32),
    "TaylorSeer lite": taylorseer(cache_interval=4, use_lite_mode=True),
    "Pyramid": broadcast(**SPATIAL),
    "Pyramid with cross": broadcast(**SPATIAL, **CROSS),
    "FasterCache distilled": faster_cache(**DISTILLED),
}


def compared(denoiser, new_config, dtype=FLOAT32, **options):
    """Both runs, checked for equality. Ours, to look at what it did."""
    (theirs, their_error), (ours, our_error) = recorded_both(denoiser, new_config, dtype=dtype, **options)
    if their_error or our_error:
        raise their_error or our_error
    ours.assert_equal(theirs)
    return ours


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=named)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("denoiser", DENOISERS, ids=named)
def test_outputs_and_executions_are_those_of_diffusers(denoiser, strategy, dtype):
    run = compared(denoiser, STRATEGIES[strategy], dtype)
    assert 0 < len(run.reused()) < len(run.calls)


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("denoiser", [COGVIDEOX, WAN], ids=named)
@pytest.mark.parametrize("factors", [None, FLOAT32, BFLOAT16], ids=named)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=named)
def test_taylorseer_of_every_order_and_precision(denoiser, order, factors, dtype):
    settings = dict(cache_interval=3, disable_cache_before_step=5, max_order=order, taylor_factors_dtype=factors)
    run = compared(denoiser, taylorseer(cache_identifiers=ATTENTION, **settings), dtype)
    assert len({step for step, _ in run.reused()}) == 10  # 5 and of every three after it two, from 7 to 19


@pytest.mark.parametrize(
    "settings",
    [
        dict(**FORECAST, skip_predict_identifiers=[r".*blocks\.0\.attn1?$"]),
        dict(**FORECAST, disable_cache_after_step=12),
        dict(cache_interval=4, disable_cache_after_step=12, use_lite_mode=True, cache_identifiers=ATTENTION),
        dict(cache_interval=2, cache_identifiers=[r".*blocks\.\d+$", *ATTENTION]),
        dict(cache_interval=3, disable_cache_before_step=1, cache_identifiers=ATTENTION),
    ],
    ids=["a silent attention", "not at the end", "lite, not at the end", "blocks", "short warm-up"],
)
@pytest.mark.parametrize("denoiser", DENOISERS, ids=named)
def test_taylorseer_where_told(denoiser, settings):
    assert compared(denoiser, taylorseer(**settings)).reused()


@pytest.mark.parametrize("denoiser", [each for each in DENOISERS if each is not COGVIEW4], ids=named)
def test_taylorseer_with_silent_feed_forwards(denoiser):
    run = compared(denoiser, taylorseer(**FORECAST, skip_predict_identifiers=FEED_FORWARDS))
    assert min(map(len, run.ran)) < min(map(len, compared(denoiser, taylorseer(**FORECAST)).ran))


def test_taylorseer_starts_over_when_shapes_change():
    def runs(run, model):  # 20 calls in each context: the next one is computed
        return [run(seed=1), run(seed=2, shape=(1, 4, 2, 8, 12))]

    assert len(compared(WAN, taylorseer(**FORECAST, max_order=2), runs=runs).reused()) == 56


def test_taylorseer_on_the_whole_model():
    assert len(compared(FLUX, taylorseer(cache_identifiers=[""])).reused()) == 13


@pytest.mark.parametrize("denoiser", [COGVIDEOX, WAN, LTX, MOCHI, COGVIEW4, LATTE], ids=named)
def test_taylorseer_finds_nothing_by_its_own_names_where_diffusers_finds_nothing(denoiser):
    assert not compared(denoiser, taylorseer()).reused()  # W4


@pytest.mark.parametrize("denoiser", [FLUX, HUNYUAN_VIDEO, QWEN_IMAGE, FLUX2, SD3], ids=named)
def test_taylorseer_by_its_own_names(denoiser):
    assert compared(denoiser, taylorseer()).reused()


@pytest.mark.parametrize("threshold", [0.0, 0.05, 1e9])
@pytest.mark.parametrize("denoiser", DENOISERS, ids=named)
def test_first_block_at_other_thresholds(denoiser, threshold):
    run = compared(denoiser, first_block(threshold))
    assert len(run.reused()) == 0 or threshold > 0
    assert len(run.reused()) >= 19 or threshold < 1


@pytest.mark.parametrize(
    "settings",
    [{}, CROSS, TEMPORAL, SPATIAL | TEMPORAL, SPATIAL | dict(spatial_attention_block_identifiers=(r"blocks\.[01]\.",))],
    ids=["defaults", "cross only", "temporal only", "spatial and temporal", "first blocks only"],
)
@pytest.mark.parametrize("denoiser", [*DENOISERS, LATTE], ids=named)
def test_pyramid_attention_where_told(denoiser, settings):
    run = compared(denoiser, broadcast(**settings))
    has_cross, has_temporal = denoiser in (WAN, LATTE), denoiser is LATTE
    expected = {"cross": has_cross, "temporal": has_temporal}
    kinds = {name.split("_")[0] for name, value in settings.items() if name.endswith("block_skip_range")} or {"spatial"}
    assert bool(run.reused()) == any(expected.get(kind, True) for kind in kinds)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=named)
@pytest.mark.parametrize("denoiser", [COGVIDEOX, WAN_JOINED, MOCHI, LATTE], ids=named)
@pytest.mark.parametrize(
    "settings",
    [
        GUIDED,
        GUIDED | dict(alpha_low_frequency=1.3, high_frequency_weight_update_timestep_range=(-1, 600)),
        GUIDED | dict(attention_weight_callback=lambda module: 0.2, low_frequency_weight_callback=lambda module: 1.4),
        GUIDED | dict(high_frequency_weight_callback=lambda module: 0.7, spatial_attention_block_skip_range=3),
        GUIDED
        | dict(temporal_attention_block_skip_range=3, spatial_attention_block_identifiers=(r"^.*blocks\.[02]\.attn",)),
    ],
    ids=["plain", "other windows", "callbacks", "every third attention", "temporal, and some blocks"],
)
def test_faster_cache_with_guidance(denoiser, settings, dtype):
    run = compared(denoiser, faster_cache(**settings), dtype)
    halved = [names for names in run.ran if "the model on a batch of 1" in names]
    assert 0 < len(halved) < len(run.ran)
    assert run.reused()


EDGES = (149, 849)  # two of CogVideoX's timesteps, at odd calls


@pytest.mark.parametrize(
    "new_config",
    [
        broadcast(spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=EDGES),
        faster_cache(**GUIDED | dict(unconditional_batch_timestep_skip_range=EDGES, unconditional_batch_skip_range=2)),
        faster_cache(**GUIDED | dict(spatial_attention_timestep_skip_range=EDGES)),
        faster_cache(**GUIDED | dict(low_frequency_weight_update_timestep_range=EDGES)),
        faster_cache(**GUIDED | dict(high_frequency_weight_update_timestep_range=EDGES)),
    ],
    ids=["Pyramid", "unconditional", "attention", "low frequencies", "high frequencies"],
)
def test_the_ends_of_a_window_are_outside(new_config):
    run = compared(COGVIDEOX, new_config)
    timesteps = COGVIDEOX.scheduler()
    timesteps.set_timesteps(20)
    assert set(EDGES) <= set(timesteps.timesteps.tolist())
    assert run.reused()


def test_faster_cache_halves_the_inputs_it_is_told():
    names = ["hidden_states", "encoder_hidden_states", "timestep", "pooled_projections"]
    settings = GUIDED | dict(_unconditional_conditional_input_kwargs_identifiers=names)
    run = compared(SD3, faster_cache(**settings))
    assert any("the model on a batch of 1" in names for names in run.ran)


def test_faster_cache_with_no_input_it_knows_runs_both_halves():
    settings = GUIDED | dict(_unconditional_conditional_input_kwargs_identifiers=["other"])
    (theirs, their_error), (ours, our_error) = recorded_both(COGVIDEOX, faster_cache(**settings))
    ours.assert_equal(theirs)
    assert type(our_error) is type(their_error)


@pytest.mark.parametrize("denoiser", [LATTE, FLUX2, SD3], ids=named)
@pytest.mark.parametrize("strategy", ["TaylorSeer order 2", "Pyramid", "Pyramid with cross", "FasterCache distilled"])
def test_more_models(denoiser, strategy):
    assert compared(denoiser, STRATEGIES[strategy]).reused()


def two_runs(run, model):
    return [run(seed=1), run(seed=2)]


def two_runs_with_a_reset(run, model):
    first = run(seed=1)
    model._reset_stateful_cache()
    return [first, run(seed=2)]


def an_aborted_run_and_another(run, model):
    return [run(seed=1, stop_after=7), run(seed=2, steps=10)]


@pytest.mark.parametrize("runs", [two_runs, two_runs_with_a_reset, an_aborted_run_and_another])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "FasterCache guided"])
@pytest.mark.parametrize("denoiser", [COGVIDEOX, WAN], ids=named)
def test_what_is_remembered_lives_as_long(denoiser, strategy, runs):
    if strategy == "FasterCache guided":
        denoiser = {"Wan": WAN_JOINED}.get(denoiser.name, denoiser)
    new_config = STRATEGIES.get(strategy) or faster_cache(**GUIDED)
    assert compared(denoiser, new_config, runs=runs).reused()


# What diffusers 0.42.1 raises, and where: on enabling, or at the call of this number.
RAISING = {
    "FirstBlock, one block": (LTX, first_block(), IndexError, "enabling"),
    "FirstBlock, blocks not listed": (CHROMA, first_block(0.1), ValueError, "enabling"),
    "FirstBlock, image and text in two layouts": (FLUX2, first_block(0.1), TypeError, 0),
    "FirstBlock, last block without text": (SD3, first_block(0.1), TypeError, 0),
    "FirstBlock, space and time in turns": (LATTE, first_block(0.1), RuntimeError, 0),
    "TaylorSeer, no warm-up": (FLUX, taylorseer(disable_cache_before_step=0), ValueError, 0),
    "TaylorSeer lite, block without text": (SD3, taylorseer(use_lite_mode=True), AttributeError, 0),
    "TaylorSeer, silent where a block runs it twice": (  # CogView4 has one feed-forward for image and text
        COGVIEW4,
        taylorseer(**FORECAST, skip_predict_identifiers=FEED_FORWARDS),
        RuntimeError,
        2,
    ),
    "Pyramid, no timestep": (FLUX, broadcast(current_timestep_callback=None), ValueError, "enabling"),
    "FasterCache, unknown format": (FLUX, faster_cache(tensor_format="BSC"), ValueError, "enabling"),
    "FasterCache, no timestep": (FLUX, faster_cache(current_timestep_callback=None), TypeError, 0),
    "FasterCache, distilled from the start": (
        FLUX,
        faster_cache(is_guidance_distilled=True, spatial_attention_timestep_skip_range=(-1, 1001)),
        TypeError,
        0,
    ),
    "FasterCache, temporal on Flux": (
        FLUX,
        faster_cache(temporal_attention_block_skip_range=2, temporal_attention_block_identifiers=("attn",)),
        AttributeError,
        "enabling",
    ),
    "FasterCache, Flux without guidance in the batch": (FLUX, faster_cache(**GUIDED), IndexError, 0),
    "FasterCache, HunyuanVideo without guidance in the batch": (HUNYUAN_VIDEO, faster_cache(**GUIDED), IndexError, 0),
    "FasterCache, Wan's branches apart": (WAN, faster_cache(**GUIDED), IndexError, 0),
    "FasterCache, QwenImage's branches apart": (QWEN_IMAGE, faster_cache(**GUIDED), IndexError, 0),
    "FasterCache, CogView4's branches apart": (COGVIEW4, faster_cache(**GUIDED), IndexError, 0),
    "FasterCache, tokens": (LTX, faster_cache(**GUIDED), RuntimeError, 10),
    "FasterCache, an input that is not halved": (SD3, faster_cache(**GUIDED), RuntimeError, 12),
    "FasterCache, a halved input that is missing": (
        COGVIDEOX,
        faster_cache(**GUIDED, _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "return_dict"]),
        AttributeError,
        4,
    ),
}
ONE_BLOCK = {"FirstBlock, one block"}


@pytest.mark.parametrize("strict", [False, True], ids=["diffusers", "strict_parity"])
@pytest.mark.parametrize("case", RAISING)
def test_what_raises_in_diffusers_raises_here(case, strict, monkeypatch):
    denoiser, new_config, error, when = RAISING[case]
    if case in ONE_BLOCK:
        whole = denoiser.model
        monkeypatch.setitem(vars(denoiser), "model", lambda: cut_to_one_block(whole()))
    recording, raised = recorded(denoiser, new_config, strict=strict)
    assert type(raised) is error
    assert len(recording.calls) == (0 if when == "enabling" else when)


def cut_to_one_block(model):
    model.transformer_blocks = model.transformer_blocks[:1]
    return model


@pytest.mark.parametrize("strict", [False, True], ids=["diffusers", "strict_parity"])
@pytest.mark.parametrize("strategy", ["FirstBlock", "TaylorSeer order 1"])
def test_a_call_without_a_context_is_an_error(strategy, strict):
    _, raised = recorded(FLUX, STRATEGIES[strategy], strict, runs=lambda run, model: [run(context=without_context)])
    assert isinstance(raised, ValueError)
    assert str(raised).startswith("No cache context is set")


@pytest.mark.parametrize("strategy", ["Pyramid", "FasterCache distilled"])
def test_where_branches_share_one_memory_no_context_is_needed(strategy):
    assert compared(FLUX, STRATEGIES[strategy], runs=lambda run, model: [run(context=without_context)]).reused()


@pytest.mark.parametrize("denoiser", DENOISERS, ids=named)
def test_branches_of_one_name_share_one_memory(denoiser):
    from cache_core.adapters.diffusers import cache_context

    same = dict(context=lambda model, name: cache_context(model, "same"))
    assert compared(denoiser, STRATEGIES["TaylorSeer order 1"], runs=lambda run, model: [run(**same)]).reused()


def test_first_block_reuses_where_nothing_changed_at_threshold_zero():
    run = compared(FLUX, first_block(0.0), runs=lambda run, model: [run(stop_after=1), run(stop_after=1)])
    assert len(run.reused()) == 1


@pytest.mark.parametrize("denoiser", [FLUX, WAN], ids=named)
def test_first_block_compares_a_change_rounded_to_the_models_dtype(denoiser):
    change = first_change(denoiser)
    for threshold in (change, change * (1 - 1e-6)):  # bfloat16 knows no number between them
        run = compared(denoiser, first_block(threshold), BFLOAT16, runs=lambda run, model: [run(stop_after=2)])
        assert ((1, "cond") in run.reused()) == (threshold == change)


def first_change(denoiser):
    """By how much the first block's residual changes from the first step to the second, in bfloat16."""
    model, residuals = made(denoiser, BFLOAT16), []
    block = next(child[0] for child in model.children() if isinstance(child, torch.nn.ModuleList))

    def see(block, args, kwargs, output):
        entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        residuals.append((output[1] if isinstance(output, tuple) else output) - entered)

    block.register_forward_hook(see, with_kwargs=True)
    denoise(denoiser, model, Clock(), stop_after=2)
    before, now = residuals[0], residuals[len(residuals) // 2]
    return ((now - before).abs().mean() / before.abs().mean()).item()


@pytest.mark.parametrize("poison", [float("nan"), 0.0], ids=["nan", "zero"])
def test_first_block_reuses_on_nan_and_on_nothing(poison):
    """W22: a change that is no number is not above the threshold."""

    def runs(run, model):
        first = run(stop_after=2)
        for parameter in model.transformer_blocks[0].parameters():
            parameter.mul_(poison)
        return [first, run(stop_after=2)]

    run = compared_with_nan(FLUX, first_block(0.0), runs=runs)
    assert run.reused()


def compared_with_nan(denoiser, new_config, **options):
    (theirs, _), (ours, error) = recorded_both(denoiser, new_config, **options)
    assert error is None
    assert ours.ran == theirs.ran
    for mine, other in zip(ours.outputs, theirs.outputs):
        assert torch.equal(mine.nan_to_num(123.0), other.nan_to_num(123.0))
    return ours
