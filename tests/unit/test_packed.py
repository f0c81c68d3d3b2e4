"""What is kept in main memory or in fewer bits: same reuse, same pictures or nearly, and as many bytes as foretold."""

from dataclasses import replace

import pytest
import torch
from published import as_published
from test_budget import ATTENTION, STRATEGIES
from test_cuda import cuda, on_each_device
from toy import (
    NEGATIVE,
    POSITIVE,
    GuidedSampling,
    Sampling,
    Toy,
    first_latent,
    relative_error,
    uncached,
)

from cache_core.model import failures
from cache_core.run import worth
from cache_core.run.memory import away_in
from cache_core.run.run import CacheRun
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategy import Schedule, Site
from cache_core.strategy.lane import Lane
from cache_core.strategy.packed import Packed, away, bytes_packed, packed

LARGE = [name for name in STRATEGIES if name not in ("first block", "output", "model")]  # those that hold much
ON_HOST = [name for name in STRATEGIES if name != "first block"]  # those that can hold it there
layouts = pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])


def with_room(sampling, free, free_away=None):
    """The same sampling with so many bytes free on the device and in main memory."""
    sampling.run = CacheRun(
        sampling.strategies, Schedule(sampling.sigmas), free=lambda device: free, free_away=lambda device: free_away
    )
    return sampling


@pytest.fixture
def it_pays(monkeypatch):
    """A bus so fast that the toy's attentions are fetched faster than computed."""
    monkeypatch.setattr(worth, "OPERATIONS_PER_BYTE", 0.01)


def sampled(strategy, layout="joined"):
    sampling = Sampling(Toy(), (strategy,), layout=layout)
    return sampling, sampling.sample(first_latent())


# In main memory


@layouts
@pytest.mark.parametrize("name", ON_HOST)
def test_in_main_memory_the_picture_is_bit_for_bit_that_on_the_device(name, layout):
    on_device, picture = sampled(STRATEGIES[name], layout)
    on_host, same = sampled(replace(STRATEGIES[name], cache_device="cpu"), layout)
    assert torch.equal(same, picture)
    calls, others = ([call.action for call in each.report.calls] for each in (on_device, on_host))
    assert calls == others and on_host.report.count("reused", "forecast") >= 2
    assert on_host.report.bytes_held == on_host.report.bytes_foretold == on_device.report.bytes_away == 0
    assert on_host.report.bytes_away == on_device.report.bytes_held > 0
    assert on_host.report.bytes_foretold_away == on_device.report.bytes_foretold
    assert "in main memory" in on_host.report.line() and "in main memory" not in on_device.report.line()


def test_of_guidance_nothing_goes_away():
    strategy = as_published(spatial_attention_timestep_skip_end=1001, cache_device="cpu")
    latent = first_latent(tokens=60)
    samplings = [GuidedSampling(Toy(), (each,)) for each in (strategy, replace(strategy, cache_device="gpu"))]
    assert torch.equal(*(sampling.sample(latent) for sampling in samplings))
    on_host, on_device = (sampling.report for sampling in samplings)
    assert on_host.bytes_held == 2 * latent.nbytes  # low and high frequencies, float32
    assert on_host.bytes_away == on_device.bytes_held - on_host.bytes_held > 0


@layouts
@pytest.mark.parametrize(("name", "held"), [("broadcast", 1), ("faster", 2), ("block", 2)])
def test_what_does_not_fit_on_the_device_waits_in_main_memory(it_pays, name, held, layout):
    free = ATTENTION * 2 * held * 2  # two sites, of two branches
    sampling = with_room(Sampling(Toy(), (STRATEGIES[name],), layout=layout), free, 10**9)
    picture = sampling.sample(first_latent())
    everything, whole = sampled(STRATEGIES[name], layout)
    if layout == "joined":
        assert torch.equal(picture, whole)
        assert sampling.report.computed_share == everything.report.computed_share < 0.9
    else:  # a site that leaves the device for the second branch is computed once more for the first
        assert relative_error(picture, whole) < 0.05
        assert sampling.report.computed_share <= everything.report.computed_share + 2 / 12
    always = [unit.rows == 24 for unit in sampling.toy.units("block" if name == "block" else "attention")]
    assert not any(always)
    assert 0.9 * free <= sampling.report.bytes_held <= free
    assert sampling.report.bytes_away == sampling.report.bytes_foretold_away == 3 * free / 2
    (note,) = [note for note in sampling.report.notes if "fit in" in note]
    assert "2 of 5" in note and note.endswith(" GiB; 3 wait in main memory")


def test_an_attention_leaves_where_guidance_needs_its_place(it_pays, monkeypatch):
    monkeypatch.setattr("cache_core.run.budget.GIB", 2 * 2 * 66 * 16 * 4)  # two outputs, two branches, text and picture
    strategy = as_published(spatial_attention_timestep_skip_end=1001, memory_limit_gb=3.0)
    sampling = with_room(GuidedSampling(Toy(), (strategy,)), 0.0, 10**9)
    picture = sampling.sample(first_latent(tokens=60))
    assert sampling.report.bytes_foretold <= 3 * 2 * 2 * 66 * 16 * 4 and sampling.report.bytes_foretold_away > 0
    assert any("2 of 5 attentions fit in 3 GiB; 3 wait" in note for note in sampling.report.notes)
    assert not any("always run" in note for note in sampling.report.notes)
    assert all(unit.rows < 20 for unit in sampling.toy.units("attention"))
    assert relative_error(picture, uncached(Toy(), first_latent(tokens=60))) < 0.1


def test_what_fits_nowhere_always_runs(it_pays):
    sampling = with_room(Sampling(Toy(), (STRATEGIES["broadcast"],)), 2 * ATTENTION * 2, ATTENTION * 2)
    picture = sampling.sample(first_latent())
    assert (sampling.report.bytes_held, sampling.report.bytes_away) == (2 * ATTENTION * 2, ATTENTION * 2)
    always = [unit.rows == 24 for unit in sampling.toy.units("attention")]
    assert sorted(always) == [False] * 3 + [True] * 2
    (note,) = [note for note in sampling.report.notes if "fit in" in note]
    assert note.endswith("GiB; 1 wait in main memory, the others always run")
    assert relative_error(picture, uncached(Toy(), first_latent())) < 0.2


@pytest.mark.parametrize(
    ("cache_device", "operations", "free_away"), [("auto", 10**6, 10**9), ("gpu", 0.01, 10**9), ("auto", 0.01, None)]
)
def test_nothing_waits_that_is_computed_faster_or_is_told_to_stay(monkeypatch, cache_device, operations, free_away):
    monkeypatch.setattr(worth, "OPERATIONS_PER_BYTE", operations)
    strategy = replace(STRATEGIES["broadcast"], cache_device=cache_device)
    sampling = with_room(Sampling(Toy(), (strategy,)), 2 * ATTENTION * 2, free_away)
    sampling.sample(first_latent())
    assert sampling.report.bytes_away == 0 and sampling.report.bytes_held == 2 * ATTENTION * 2
    assert any("2 of 5 attentions fit in" in note and "always run" in note for note in sampling.report.notes)


def test_a_limit_is_of_main_memory_where_all_is_kept_there(monkeypatch):
    monkeypatch.setattr("cache_core.run.budget.GIB", ATTENTION * 2)
    strategy = replace(STRATEGIES["broadcast"], cache_device="cpu", memory_limit_gb=3.0)
    sampling = with_room(Sampling(Toy(), (strategy,)), 0.0, 10**9)
    sampling.sample(first_latent())
    assert (sampling.report.bytes_held, sampling.report.bytes_away) == (0, 3 * ATTENTION * 2)
    assert any("3 of 5 attentions fit in 3 GiB (memory_limit_gb); the others" in n for n in sampling.report.notes)


def test_the_work_of_a_site_is_known_from_its_shapes_and_parameters():
    """Wan 14B at 480p: worth fetching. Flux at 1024 x 1024: not."""
    features = [torch.empty(1, 32760, 5120, dtype=torch.bfloat16, device="meta")]
    work = worth.work_of(features, "spatial", 4 * 5120**2)
    assert work == pytest.approx(2 * 4 * 5120**2 * 32760 + 4 * 32760**2 * 5120)
    one = bytes_packed(features, None)
    assert worth.is_fetched_faster(2 * one, work) and worth.is_fetched_faster(3 * one, work)
    assert not worth.is_fetched_faster(2 * one, worth.work_of(features, "cross", 4 * 5120**2))
    volume = [torch.empty(1, 21, 30, 52, 5120, dtype=torch.bfloat16, device="meta")]
    assert worth.work_of(volume, "spatial", 4 * 5120**2) == pytest.approx(work)
    flux = [torch.empty(1, 4608, 3072, dtype=torch.bfloat16, device="meta")]
    assert not worth.is_fetched_faster(2 * bytes_packed(flux, None), worth.work_of(flux, "spatial", 0))


@layouts
def test_the_next_site_is_fetched_while_one_runs(monkeypatch, layout):
    """Nobody waits for a copy that was not begun before, but for those of the first site of a call."""
    late, back = [], Lane.back

    def watched(lane, waiting):
        late.append(waiting not in lane._arriving)
        return back(lane, waiting)

    monkeypatch.setattr(Lane, "back", watched)
    sampling, _ = sampled(replace(STRATEGIES["faster"], cache_device="cpu"), layout)
    outputs = {"computed": 0, "reused": 1, "forecast": 2}
    of_one_site = sum(len(call.branches) * outputs[call.action] for call in sampling.report.calls)
    assert len(late) == 5 * of_one_site > 0 and sum(late) <= of_one_site


def test_memory_that_runs_out_in_a_copy_to_main_memory_does_not_end_the_run(monkeypatch):
    left, copy = [37], Lane._copy

    def failing(lane, sources, targets):
        left[0] -= 1
        if left[0] == 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return copy(lane, sources, targets)

    monkeypatch.setattr(Lane, "_copy", failing)
    monkeypatch.setattr(failures, "give_back", lambda device: None)
    sampling, picture = sampled(replace(STRATEGIES["broadcast"], cache_device="cpu"))
    assert left[0] <= 0 and sum("memory ran out" in note for note in sampling.report.notes) == 1
    assert relative_error(picture, uncached(Toy(), first_latent())) < 0.05
    assert not sampling.run.state.memories and sampling.report.bytes_away > 0


def test_where_no_more_memory_can_be_pinned_other_memory_does(monkeypatch):
    own = torch.empty

    def empty(*shape, pin_memory=False, **kind):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return own(*shape, **kind)

    monkeypatch.setattr(torch, "empty", empty)
    lane = Lane(torch.device("cpu"))
    lane.pins = True
    waiting = lane.away((torch.ones(2, 3),))
    assert not lane.pins and torch.equal(waiting.back()[0], torch.ones(2, 3))


def test_nothing_is_referred_to_after_the_run():
    sampling, _ = sampled(replace(STRATEGIES["broadcast"], cache_device="cpu"))
    lanes = list(sampling.run.state.budget._lanes.values())
    assert lanes and any(lane._leaving for lane in lanes)
    sampling.run.free()
    assert not any(lane._leaving or lane._arriving for lane in lanes)


# In fewer bits


@pytest.mark.parametrize("cache_device", ["auto", "cpu"])
@pytest.mark.parametrize("name", ["broadcast", "faster"])
@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 1 / 2), ("8 bit", (16 + 4) / 64)])  # rows of 16 channels
def test_fewer_bits_take_less_memory_and_reuse_as_much(name, dtype, share, cache_device):
    whole, picture = sampled(STRATEGIES[name])
    less, near = sampled(replace(STRATEGIES[name], cache_dtype=dtype, cache_device=cache_device))
    held, foretold = (less.report.bytes_held, less.report.bytes_foretold)
    if cache_device == "cpu":
        held, foretold = less.report.bytes_away, less.report.bytes_foretold_away
    assert held == foretold == share * whole.report.bytes_held > 0
    assert less.report.computed_share == whole.report.computed_share < 0.9
    assert 0 < relative_error(near, picture) < 0.01
    assert less.report.count("reused", "forecast") == whole.report.count("reused", "forecast") >= 2


def test_half_the_memory_is_enough_for_twice_the_sites():
    free = ATTENTION // 2 * 2 * 4  # four sites in 16 bit
    sampling = with_room(Sampling(Toy(), (replace(STRATEGIES["broadcast"], cache_dtype="bfloat16"),)), free)
    sampling.sample(first_latent())
    assert any("4 of 5 attentions fit" in note for note in sampling.report.notes)


@on_each_device
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16])
def test_8_bits_keep_each_token_by_a_scale_of_its_own(of, device):
    tokens = torch.randn(3, 50, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 50)[:, None]
    tokens = tokens.to(device, of)
    kept = packed(tokens, torch.int8)
    assert isinstance(kept, Packed) and kept.parts[0].dtype is torch.int8 and kept.parts[1].shape == (3, 50, 1)
    again = kept.restored()
    assert again.dtype is of and again.shape == tokens.shape
    error = (again.double() - tokens.double()).norm(dim=-1) / tokens.double().norm(dim=-1)
    assert error[:, 20:].max() < 0.012  # 38 dB below each; float16 has few bits for the first ones


@pytest.mark.parametrize("at_once", [1, 300, 2**24])
def test_they_are_made_some_at_a_time(monkeypatch, at_once):
    tokens = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(0))
    expected = packed(tokens, torch.int8).restored()
    monkeypatch.setattr("cache_core.strategy.packed.AT_ONCE", at_once)
    assert torch.equal(packed(tokens, torch.int8).restored(), expected)


def test_what_is_no_number_stays_none_and_zero_stays_zero():
    tokens = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0], [1.0, -2.0]])
    again = packed(tokens, torch.int8).restored()
    assert torch.equal(again[0], tokens[0]) and again[3].allclose(tokens[3], rtol=0.01)
    assert not again[1].isfinite().any() and not again[2].isfinite().all()


@pytest.mark.parametrize("tensor", [torch.arange(6).reshape(2, 3), torch.ones(()), torch.ones(2, 3).bfloat16()])
def test_what_would_not_get_smaller_stays_as_it_is(tensor):
    kept = packed(tensor, torch.bfloat16, copy=True) if tensor.ndim else packed(tensor, torch.int8, copy=True)
    assert torch.equal(kept, tensor) and kept.data_ptr() != tensor.data_ptr()
    assert bytes_packed([tensor], torch.int8 if not tensor.ndim else torch.bfloat16) == tensor.nbytes


def test_what_is_restored_may_be_written_into():
    for kept in (packed(torch.ones(2, 64), torch.bfloat16), away(torch.ones(2, 64), Lane(torch.device("cpu")))):
        kept.restored().zero_()
        assert torch.equal(kept.restored(), torch.ones(2, 64))


@pytest.mark.parametrize("value", ["int8", "float8", "", None, 8])
def test_other_forms_are_refused(value):
    with pytest.raises(ValueError, match=r"cache_dtype.*Choose one of: as computed, bfloat16, 8 bit"):
        PyramidAttentionBroadcast(cache_dtype=value)
    with pytest.raises(ValueError, match=r"cache_device.*Choose one of: auto, gpu, cpu"):
        as_published(cache_device=value)


def test_guidance_is_never_in_fewer_bits():
    strategy, latent = as_published(cache_dtype="8 bit"), torch.empty(1, 4, 8, 8)
    assert strategy.stored_as(Site("guidance", "")) is None
    assert strategy.will_hold(Site("guidance", ""), (latent, latent)) == 2 * latent.nbytes


# On CUDA


@pytest.mark.parametrize("device", [cuda])
def test_main_memory_is_pinned_and_copies_run_beside_the_model(device):
    lane = Lane(torch.device("cuda", torch.cuda.current_device()))
    source = torch.randn(64, 1024, device=device)
    waiting = lane.away((source,))
    assert waiting.parts[0].is_pinned() and lane.stream != torch.cuda.current_stream()
    lane.fetch([waiting])
    assert torch.equal(waiting.back()[0], source)


@pytest.mark.parametrize("device", [cuda])
@pytest.mark.parametrize("is_fetched", [True, False])
def test_copies_are_made_in_the_order_of_the_model_s_work(device, is_fetched):
    """The model's stream is behind by long work, writes what is copied late, and uses it again at once."""
    lane = Lane(torch.device("cuda", torch.cuda.current_device()))
    slow, expected, kept = torch.randn(4096, 4096, device=device), [], []
    for number in range(12):
        for _ in range(8):
            torch.mm(slow, slow)
        kept.append(away(torch.full((4096, 1024), float(number), device=device), lane))  # freed at once
        torch.full((4096, 1024), -1.0, device=device)  # would take its memory
    for number, (one, following) in enumerate(zip(kept, [*kept[1:], None])):
        value = one.restored()
        if is_fetched and following is not None:
            lane.fetch([following.kept])
        expected.append((value == number).all())
        del value
        torch.full((4096, 1024), -1.0, device=device)
    lane.close()
    assert all(bool(each) for each in expected)


@pytest.mark.parametrize("device", [cuda])
def test_on_the_device_little_is_left_of_what_is_away(device):
    torch.cuda.synchronize()
    lane, before = Lane(torch.device("cuda", torch.cuda.current_device())), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = [away(torch.ones(2**20, device=device), lane) for _ in range(16)]
    assert torch.cuda.max_memory_allocated() - before <= 4 * 2**22
    lane.close()
    assert torch.cuda.memory_allocated() == before and len(away_in([kept])) == 16


@pytest.mark.parametrize("device", [cuda])
@pytest.mark.parametrize("name", LARGE)
def test_on_cuda_the_picture_from_main_memory_is_that_from_the_device(device, name):
    latents = []
    for cache_device in ("gpu", "cpu"):
        sampling = Sampling(Toy().to(device), (replace(STRATEGIES[name], cache_device=cache_device),))
        latent = first_latent().to(device)
        for index in range(12):
            with torch.device(device):
                latent = latent - 0.05 * sum(sampling.predict({POSITIVE: latent, NEGATIVE: latent}, index).values())
        latents.append(latent)
        assert sampling.report.count("reused", "forecast") >= 2
    assert torch.equal(*latents) and sampling.report.bytes_away > 0
