"""FasterCache: attention from the last two, the prediction without the prompt from the other, and what that holds."""

import weakref
from dataclasses import dataclass, field
from math import hypot

import pytest
import torch
from published import as_published
from toy import (
    IMAGE,
    NEGATIVE,
    PICTURE,
    POSITIVE,
    TEXT,
    C,
    GuidedSampling,
    Sampling,
    TextBeside,
    ThreeKindsBlock,
    Toy,
    W,
    alive,
    first_latent,
    relative_error,
    reused_by_hand,
    sigmas_of,
    tensors_in,
    uncached,
)

from cache_core import CacheRun, Schedule
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategy.tensors import split_frequencies

TOKENS = PICTURE[0] * PICTURE[1]
ATTENTION_ONLY = dict(unconditional_batch_skip_range=1, spatial_attention_timestep_skip_end=1001)
GUIDANCE_ONLY = dict(spatial_attention_block_skip_range=1)
ALWAYS_SKIPPING = dict(unconditional_batch_timestep_skip_start=-1, unconditional_batch_timestep_skip_end=1001)
SHAPES = [(1, 2, 8, 8), (2, 4, 7, 9), (1, 4, 6, 10), (1, 3, 16, 5), (1, 1, 4, 31), (1, 4, 3, 12, 20), (2, 2, 1, 9, 6)]
layouts = pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def disc(height, width):
    """What counts as low in a spectrum with frequency zero in the middle."""
    radius = min(height, width) // 5
    rows = [[hypot(y - height // 2, x - width // 2) <= radius for x in range(width)] for y in range(height)]
    return torch.tensor(rows)


def spectrum_of(latent):
    return torch.fft.fftshift(torch.fft.fft2(latent), dim=(-2, -1))


def picture_of(spectrum):
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real


def published(conditional, before, low_weight, high_weight):
    """The estimate as published, through the spectra of all three predictions. `before`: the last two computed."""
    with_prompt, without_prompt = map(spectrum_of, before)
    low = disc(*conditional.shape[-2:])
    weights = torch.where(low, low_weight, high_weight)
    return picture_of(spectrum_of(conditional) + weights * (without_prompt - with_prompt))


@dataclass
class Guidance:
    """A run that is asked for both predictions, evaluation by evaluation; they are noise, another in each."""

    strategy: FasterCache
    sigmas: list[float] = field(default_factory=lambda: sigmas_of(20))
    shape: tuple[int, ...] = (1, C, *PICTURE)
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        self.run = CacheRun((self.strategy,), Schedule(self.sigmas))
        self.model, self.asked = torch.nn.Identity(), []

    def predictions(self, index):
        return tuple(noise((2, *self.shape), seed=index).to(self.dtype))

    def evaluate(self, index):
        def predict(*wanted):
            self.asked.append(wanted)
            self.run.state.was_called = True  # as if the model had been
            return [
                part if is_wanted else None for part, is_wanted in zip(self.predictions(index), wanted, strict=True)
            ]

        self.run.begin_evaluation()
        return self.run.call_guidance(self.model, predict, torch.tensor([self.sigmas[index]]), NEGATIVE, NEGATIVE)

    def skipped(self):
        """Runs to its end. The steps in which the prediction without the prompt was not asked for."""
        for index in range(len(self.sigmas) - 1):
            self.evaluate(index)
        assert len(self.asked) == len(self.sigmas) - 1
        assert all(with_prompt for with_prompt, _ in self.asked)
        return [index for index, (_, without_prompt) in enumerate(self.asked) if not without_prompt]


def guided(strategy, toy=None, **settings):
    """A finished run of the toy in which the negative branch may be left out."""
    sampling = GuidedSampling(toy or Toy(), (strategy,), **settings)
    return sampling, sampling.sample(first_latent(tokens=TOKENS))


@every_shape
def test_the_frequencies_add_up_to_the_latent(shape):
    low, high = split_frequencies(noise(shape))
    torch.testing.assert_close(low + high, noise(shape), rtol=0, atol=1e-6)
    assert low.dtype is high.dtype is torch.float32
    assert low.shape == high.shape == shape


@every_shape
def test_frequencies_are_split_as_by_a_disc_around_frequency_zero(shape):
    low, high = split_frequencies(noise(shape))
    spectrum, inside = spectrum_of(noise(shape).double()), disc(*shape[-2:])
    torch.testing.assert_close(low.double(), picture_of(spectrum * inside), rtol=0, atol=1e-6)
    torch.testing.assert_close(high.double(), picture_of(spectrum * ~inside), rtol=0, atol=1e-6)


@every_shape
def test_a_constant_is_low(shape):
    low, high = split_frequencies(torch.full(shape, 3.0))
    torch.testing.assert_close(low, torch.full(shape, 3.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(high, torch.zeros(shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (6, 10), (16, 30)])
def test_a_checkerboard_is_high(size):
    board = torch.tensor([[(-1.0) ** (y + x) for x in range(size[1])] for y in range(size[0])]).expand(1, 4, *size)
    torch.testing.assert_close(split_frequencies(board)[1], board, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, C, *PICTURE), (1, 2, 3, 16, 17)], ids=["picture", "video"])
def test_the_estimate_is_the_published_one_with_each_weight_in_its_window(shape):
    """From the last two computed: what is skipped several times in a row is not weighed again and again."""
    weights = dict(alpha_low_frequency=1.3, alpha_high_frequency=0.6)
    strategy = as_published(**weights, low_frequency_weight_update_start=200, low_frequency_weight_update_end=500)
    guidance, skipped = Guidance(strategy, shape=shape), []
    for index in range(20):
        with_prompt, without_prompt = guidance.evaluate(index)
        assert torch.equal(with_prompt, guidance.predictions(index)[0])
        if guidance.asked[-1] == (True, True):
            before = guidance.predictions(index)
            assert torch.equal(without_prompt, before[1])
            continue
        timestep = 1000 - 50 * index
        low, high = 1.3 if 200 < timestep < 500 else 1.0, 0.6 if timestep < 301 else 1.0
        torch.testing.assert_close(without_prompt, published(with_prompt, before, low, high), rtol=0, atol=1e-5)
        skipped.append((low, high))
    assert set(skipped) == {(1.0, 1.0), (1.3, 1.0), (1.3, 0.6), (1.0, 0.6)}


def test_an_estimate_with_weights_of_one_adds_the_difference_measured_last():
    guidance = Guidance(as_published(alpha_low_frequency=1.0, alpha_high_frequency=1.0, **ALWAYS_SKIPPING))
    before = guidance.evaluate(0)
    with_prompt, without_prompt = guidance.evaluate(1)
    torch.testing.assert_close(without_prompt, with_prompt + before[1] - before[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_estimate_has_the_type_of_the_prediction(dtype):
    guidance = Guidance(as_published(**ALWAYS_SKIPPING), dtype=dtype)
    assert [guidance.evaluate(index)[1].dtype for index in range(3)] == [dtype] * 3
    assert guidance.asked[-1] == (True, False)


@pytest.mark.parametrize(
    ("skip_range", "skipped"),
    [  # timesteps are 1000, 950, ... 50, those from 600 lie in the window
        (2, [8, 10, 12, 14, 16, 18]),
        (3, [8, 9, 11, 12, 14, 15, 17, 18]),
        (5, [8, 9, 10, 11, 13, 14, 15, 16, 18, 19]),
        (20, [*range(8, 20)]),
    ],
)
def test_the_negative_prompt_is_computed_once_in_so_many_steps(skip_range, skipped):
    assert Guidance(as_published(unconditional_batch_skip_range=skip_range)).skipped() == skipped


@pytest.mark.parametrize(("start", "end"), [(-1, 1001), (100, 700), (99, 701), (300, 650), (500, 550)])
@pytest.mark.parametrize("steps", [10, 20])
def test_the_ends_of_the_window_are_outside_and_the_first_evaluation_computes(start, end, steps):
    window = dict(unconditional_batch_timestep_skip_start=start, unconditional_batch_timestep_skip_end=end)
    guidance = Guidance(as_published(unconditional_batch_skip_range=3, **window), sigmas_of(steps))
    assert guidance.skipped() == reused_by_hand(steps, 3, start, end)


@pytest.mark.parametrize("shape", [(1, TOKENS, C), (1, 8), (1, 2, 2, 3, 6, 10)], ids=str)
def test_other_predictions_than_pictures_and_videos_are_always_computed(shape):
    guidance = Guidance(as_published(**ALWAYS_SKIPPING), shape=shape)
    assert guidance.skipped() == []
    assert not list(tensors_in(list(guidance.run.state.memories.values())))
    assert any(f"has {len(shape)} dimensions" in note for note in guidance.run.report.notes)


def test_a_range_of_one_never_skips_the_negative_prompt_and_keeps_nothing_for_it():
    guidance = Guidance(as_published(unconditional_batch_skip_range=1, **ALWAYS_SKIPPING))
    assert not guidance.run.state.terms.steps_in_at("guidance")
    assert guidance.skipped() == []
    assert not guidance.run.state.memories
    assert not guidance.run.report.calls
    assert all(map(torch.equal, guidance.evaluate(3), guidance.predictions(3)))


def test_attention_is_cached_where_the_negative_prompt_is_not():
    sampling, _ = guided(as_published(**ATTENTION_ONLY))
    assert sampling.asked == [(POSITIVE, NEGATIVE)] * 12
    assert sampling.toy.runs_of("attention") == 6 * 5
    assert {site.level for _, _, site in sampling.run.state.memories} == {"attention"}


def test_the_negative_prompt_is_skipped_where_attention_is_not_cached():
    sampling, _ = guided(as_published(**GUIDANCE_ONLY, **ALWAYS_SKIPPING))
    assert sampling.toy.rows_of("attention") == 5 * sampling.toy.rows == 5 * (12 + 3)
    assert {site.level for _, _, site in sampling.run.state.memories} == {"guidance"}


@pytest.mark.parametrize(
    ("skip_range", "reused"),
    [  # those from 650 lie in the window
        (2, [7, 9, 11, 13, 15, 17, 19]),
        (3, [7, 8, 10, 11, 13, 14, 16, 17, 19]),
    ],
)
def test_attention_computes_once_in_so_many_steps(toy, skip_range, reused):
    sampling = Sampling(toy, (as_published(spatial_attention_block_skip_range=skip_range),), sigmas_of(20))
    sampling.sample(first_latent())
    assert [call.step.index for call in sampling.report.calls if call.action != "computed"] == reused
    assert toy.runs_of("attention") == 5 * (20 - len(reused))


def test_each_kind_has_its_own_range_and_cross_attention_always_runs():
    model = TextBeside(ThreeKindsBlock)
    strategy = as_published(temporal_attention_block_skip_range=4, temporal_attention_timestep_skip_end=501)
    sampling = Sampling(model, (strategy,), sigmas_of(20))
    sampling.sample(first_latent())
    block, temporal = model.blocks[1], reused_by_hand(20, 4, -1, 501)
    assert (block.self_attn.runs, block.temporal_attn.runs, block.cross_attn.runs) == (13, 20 - len(temporal), 20)
    assert {site.kind for _, _, site in sampling.run.state.memories} == {"spatial", "temporal"}


@layouts
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("skip_range", [2, 3])
def test_what_stands_in_is_the_last_output_and_a_share_of_what_it_changed(toy, layout, weight, skip_range):
    given, computed = [], []
    toy.single_blocks[1].attn.register_forward_hook(lambda module, args, output: given.append(output.clone()))
    strategy = as_published(**ATTENTION_ONLY, spatial_attention_block_skip_range=skip_range, attention_weight=weight)
    sampling = Sampling(toy, (strategy,), layout=layout, branches=(POSITIVE,))
    sampling.sample(first_latent())
    for index, output in enumerate(given):
        if index % skip_range == 0:
            computed.append(output)
        elif len(computed) == 1:
            assert torch.equal(output, computed[0])  # nothing to see a change in
        else:
            torch.testing.assert_close(output, (1 + weight) * computed[-1] - weight * computed[-2])
    assert len(computed) == 12 // skip_range == toy.single_blocks[1].attn.runs
    actions = [call.action for call in sampling.report.calls if call.action != "computed"]
    assert actions == ["reused"] * (skip_range - 1) + ["forecast"] * (len(actions) - skip_range + 1)


@pytest.mark.parametrize("branches", [(NEGATIVE, POSITIVE), (POSITIVE, NEGATIVE)], ids=["negative-first", "last"])
@layouts
def test_when_the_negative_prompt_is_back_everything_computes(toy, layout, branches):
    """Attention would go on to be reused: what is kept of the negative branch is older than of the other."""
    strategy = as_published(
        spatial_attention_block_skip_range=20, spatial_attention_timestep_skip_end=1001,
        unconditional_batch_skip_range=3, **ALWAYS_SKIPPING,
    )  # fmt: skip
    sampling, rows = GuidedSampling(toy, (strategy,), layout=layout, branches=branches), []
    for index in range(9):
        before = toy.rows_of("attention")
        sampling.predict(dict.fromkeys(branches, first_latent(tokens=TOKENS)), index)
        rows.append(toy.rows_of("attention") - before)
    assert rows == [2 * 5, 0, 0] * 3
    assert sampling.asked == [(POSITIVE, NEGATIVE), (POSITIVE,), (POSITIVE,)] * 3


@layouts
def test_the_picture_is_nearly_the_one_without_a_cache(layout):
    latent = first_latent(tokens=TOKENS)
    sampling, result = guided(as_published(), layout=layout)
    assert sampling.toy.rows < 0.8 * 2 * 12
    assert relative_error(result, uncached(Toy(), latent)) < 0.05
    torch.testing.assert_close(result, guided(as_published())[1], rtol=1e-5, atol=1e-5)


def test_skipping_beats_leaving_out_guidance():
    latent, (_, result) = (
        first_latent(tokens=TOKENS),
        guided(as_published(**GUIDANCE_ONLY, **ALWAYS_SKIPPING)),
    )
    exact, unguided = uncached(Toy(), latent), uncached(Toy(), latent, branches=(POSITIVE,))
    assert relative_error(result, exact) < 0.1 * relative_error(unguided, exact)


@layouts
@pytest.mark.parametrize("attention", [{}, GUIDANCE_ONLY], ids=["attention", "guidance-only"])
def test_the_report_has_a_record_of_every_skip(layout, attention):
    sampling, _ = guided(as_published(**attention, **ALWAYS_SKIPPING), layout=layout)
    skips = [call for call in sampling.report.calls if call.branches == (NEGATIVE,) and call.action == "reused"]
    assert [call.step.index for call in skips] == [1, 2, 3, 4, 6, 7, 8, 9, 11]
    assert {call.reason for call in skips} == {"the negative prompt is computed once in 5 steps"}
    assert {call.computed_share for call in skips} == {0.0}
    totals = sampling.report.as_dict()["totals"]["branches"]
    assert sum(totals[POSITIVE].values()) == sum(totals[NEGATIVE].values()) == 12
    if attention == GUIDANCE_ONLY:
        assert totals[NEGATIVE] == {"computed": 3, "reused": 9, "forecast": 0}
        assert sampling.report.computed_share == pytest.approx(sampling.toy.rows / (2 * 12))


def test_the_speed_up_counts_evaluations_not_calls():
    sampling, _ = guided(as_published(**GUIDANCE_ONLY, **ALWAYS_SKIPPING), layout="separate")
    report = sampling.report
    for call in report.calls:
        call.seconds = 0.0 if call.action == "reused" else 1.0  # each model call a second
    assert report.speed_up == pytest.approx(2 * 12 / (12 + 3))


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_outputs_of_each_attention_and_branch_and_two_float32_latents_are_held(toy, layout, dtype):
    sampling = GuidedSampling(toy.to(dtype), (as_published(),), layout=layout)
    sampling.sample(first_latent(tokens=TOKENS).to(dtype))
    attentions, branches = 5, 2
    of_attention = 2 * attentions * branches * (TEXT + TOKENS) * W * dtype.itemsize
    assert sampling.report.bytes_held == of_attention + 2 * TOKENS * C * 4


def test_without_guidance_two_outputs_of_each_attention_and_branch_are_held(toy):
    sampling = Sampling(toy, (as_published(),))
    sampling.sample(first_latent())
    assert sampling.report.bytes_held == 2 * 5 * 2 * (TEXT + IMAGE) * W * 4


@layouts
def test_free_leaves_nothing(layout):
    sampling = GuidedSampling(Toy(), (as_published(),), layout=layout)
    for index in range(11):  # of 12: in the last, which nothing follows, attention is dropped
        sampling.predict(dict.fromkeys(sampling.branches, first_latent(tokens=TOKENS)), index)
    kept = [weakref.ref(tensor) for tensor in tensors_in(list(sampling.run.state.memories.values()))]
    assert len(kept) == 2 * 5 + 2  # of the positive prompt, as the negative one is skipped, and two latents
    sampling.run.free()
    assert alive(kept) == 0


WINDOWS = (
    "spatial_attention_timestep_skip",
    "temporal_attention_timestep_skip",
    "unconditional_batch_timestep_skip",
    "low_frequency_weight_update",
    "high_frequency_weight_update",
)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(("start", "end"), [(800, 100), (500, 500)])
def test_a_window_that_no_step_lies_in_is_told_with_what_to_do(name, start, end):
    strategy = as_published(temporal_attention_block_skip_range=2, **{f"{name}_start": start, f"{name}_end": end})
    assert strategy.contradiction.startswith(f"{name}_start {start} is not below {name}_end {end}: ")
    assert strategy.contradiction.endswith("set start to the lower one")


@pytest.mark.parametrize("name", ["unconditional_batch_timestep_skip", "low_frequency_weight_update"])
def test_where_one_window_is_closed_nothing_is_skipped(name):
    plain, closed = (
        as_published(unconditional_batch_skip_range=1, spatial_attention_block_skip_range=1),
        as_published(**{f"{name}_start": 700, f"{name}_end": 700}),
    )
    sampling, latent = guided(closed)
    assert torch.equal(latent, guided(plain)[1])
    assert sampling.report.count("computed") == len(sampling.report.calls) > 0
    assert f"{name}_start 700 is not below" in sampling.report.as_dict()["why_nothing"]


def test_windows_of_what_is_off_contradict_nothing():
    closed = {f"{name}_{end}": 500 for name in WINDOWS for end in ("start", "end")}
    assert not as_published(
        unconditional_batch_skip_range=1, spatial_attention_block_skip_range=1, **closed
    ).contradiction
