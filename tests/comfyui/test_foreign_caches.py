"""Caches of other packs beside ours, unknown by name: that they answer model calls shows in what runs.

Each stand-in answers some steps with what it stored, at one of the doors that such packs use.
"""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from published import as_published
from torch import nn
from zoo.cases import OFF

from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

PROMPT, STEPS, FIRST = ["a big red ball at the center on a blue striped background"], 20, 7
DIFFUSION = "diffusion_model"
WHOLE = {
    "First Block Cache": FirstBlockCache(residual_diff_threshold=0.2),
    **{
        f"TaylorSeer, {level}": TaylorSeerCache(cache_interval=2, cache_level=level, spacing="steps")  # computes step 6
        for level in ("output", "model", "block")
    },
}
PUBLISHED = as_published()


class OtherCache:
    """Answers two in three steps from the `FIRST` on with what was stored in the last one it left to the model."""

    def __init__(self):
        self.step, self.answered, self.stored = -1, [], {}

    def answers(self):
        """Whether it answers in this step."""
        does = self.step >= FIRST and self.step % 3 != 0
        if does and self.step not in self.answered:
            self.answered.append(self.step)
        return does

    def instead(self, compute, key=None):
        """What was stored under the key, or what is computed now."""
        if not self.answers():
            self.stored[key] = compute()
            return self.stored[key].clone()
        return self.stored[key].clone()

    def on(self, model, wrappers):
        """A clone with these wrappers, and one that counts the steps."""
        from comfy.patcher_extension import WrappersMP

        def begun(executor, *args, **kwargs):
            self.__init__()
            return executor(*args, **kwargs)

        def count(executor, *args, **kwargs):
            self.step += 1
            return executor(*args, **kwargs)

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "its begin", begun)
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "its count", count)
        for kind, wrapper in wrappers.items():
            clone.add_wrapper_with_key(getattr(WrappersMP, kind), "its cache", wrapper)
        return clone


def on_the_instance(method):
    """A method of the network is replaced for the length of a run: Patches_ll's and CacheDiT's way."""

    def put(other, model):
        def around_run(executor, *args, **kwargs):
            network = executor.class_obj.model_patcher.model.diffusion_model
            own, had = getattr(network, method), method in vars(network)
            stand_in = MethodType(lambda _, *args, **kwargs: other.instead(lambda: own(*args, **kwargs)), network)
            setattr(network, method, stand_in)
            try:
                return executor(*args, **kwargs)
            finally:
                setattr(network, method, own) if had else delattr(network, method)

        return other.on(model, {"OUTER_SAMPLE": around_run})

    return put


def by_wrapper(kind):
    """A wrapper of ComfyUI's does not call what it is around."""

    def put(other, model):
        return other.on(
            model, {kind: lambda executor, *args, **kwargs: other.instead(lambda: executor(*args, **kwargs))}
        )

    return put


def by_function_wrapper(other, model):
    clone = other.on(model, {})
    clone.set_model_unet_function_wrapper(
        lambda apply, args: other.instead(lambda: apply(args["input"], args["timestep"], **args["c"]))
    )
    return clone


def by_patched_blocks(other, model):
    """The first block always runs and the last one's patch gives what was stored, as a First Block Cache may do it."""
    network, clone = model.model.diffusion_model, other.on(model, {})
    places = [("double_block", index) for index in range(len(network.double_blocks))]
    places += [("single_block", index) for index in range(len(network.single_blocks))]
    for place in places:

        def patch(given, extra, place=place):
            if place == places[0]:
                return extra["original_block"](given)
            if place == places[-1]:
                return {"img": other.instead(lambda: extra["original_block"](given)["img"])}
            return dict(given) if other.answers() else extra["original_block"](given)

        clone.set_model_patch_replace(patch, "dit", *place)
    return clone


class AllButTheFirst(nn.Module):
    """Stands in a list for all its blocks."""

    def __init__(self, other, blocks):
        super().__init__()
        self.blocks, self.other = nn.ModuleList(blocks), other

    def forward(self, img, **given):
        if "txt" in given:
            return self._of_two(img, **given)
        img = self.blocks[0](img, **given)
        return img + self.other.instead(lambda: self._through(self.blocks[1:], img, given) - img, "single")

    def _of_two(self, img, txt, **given):
        img, txt = self.blocks[0](img=img, txt=txt, **given)

        def rest():
            streams = (img, txt)
            for block in self.blocks[1:]:
                streams = block(img=streams[0], txt=streams[1], **given)
            return torch.cat([streams[1] - txt, streams[0] - img], dim=1)

        rest = self.other.instead(rest, "double")
        return img + rest[:, txt.shape[1] :], txt + rest[:, : txt.shape[1]]

    @staticmethod
    def _through(blocks, img, given):
        for block in blocks:
            img = block(img, **given)
        return img


def by_other_lists(other, model):
    """One module in place of each list of blocks: cache-dit's and WaveSpeed's way."""
    clone = other.on(model, {})
    for name in ("double_blocks", "single_blocks"):
        blocks = list(model.get_model_object(f"{DIFFUSION}.{name}"))
        clone.add_object_patch(f"{DIFFUSION}.{name}", nn.ModuleList([AllButTheFirst(other, blocks)]))
    return clone


DOORS = {
    "the network's forward_orig": on_the_instance("forward_orig"),
    "the network's forward": on_the_instance("forward"),
    "DIFFUSION_MODEL": by_wrapper("DIFFUSION_MODEL"),
    "APPLY_MODEL": by_wrapper("APPLY_MODEL"),
    "PREDICT_NOISE": by_wrapper("PREDICT_NOISE"),
    "model function wrapper": by_function_wrapper,
    "patches of blocks": by_patched_blocks,
    "other lists of blocks": by_other_lists,
}


@pytest.fixture(autouse=True)
def unpatched(comfy):
    """What a stand-in put in place of the lists of blocks is put back."""
    yield
    comfy.model_management.unload_all_models()


by_door = pytest.mark.parametrize("door", DOORS)


def both(demo, other, door, cache, order):
    put, model = DOORS[door], demo.model()
    return cache(put(other, model)) if order == "cache last" else put(other, cache(model))


@pytest.fixture(scope="module")
def theirs(demo):
    """The latent with a stand-in and no cache of ours; sampled once."""
    known = {}

    def latent(door):
        if door not in known:
            other = OtherCache()
            known[door] = demo.sample(DOORS[door](other, demo.model()), PROMPT, steps=STEPS)
            assert len(other.answered) > 5
        return known[door]

    return latent


CASES = [
    (name, order)
    for name in WHOLE
    for order in ("cache last", "cache first")
    if order == "cache last" or "," not in name or "output" in name
]


@pytest.mark.parametrize(("name", "order"), CASES)
@by_door
def test_nothing_is_reused_once_another_cache_has_answered(demo, cached, reports, theirs, name, order, door):
    other, strategy = OtherCache(), WHOLE[name]
    latent = demo.sample(both(demo, other, door, lambda model: cached(model, strategy), order), PROMPT, steps=STEPS)
    (report,) = reports.all
    assert [note for note in report.notes if "another node answers model calls" in note], report.notes
    late = [call for call in report.calls if call.step.index > other.answered[0]]
    assert late and {call.action for call in late} == {"computed"}
    assert "another node" in late[-1].reason
    assert (latent - theirs(door)).norm() < 0.065 * theirs(door).norm()


@by_door
def test_the_demo_reuses_where_the_other_cache_never_answers(demo, cached, reports, door):
    """What the stand-ins put on the model is not taken for an answer."""

    class Silent(OtherCache):
        def answers(self):
            return False

    model = both(demo, Silent(), door, lambda model: cached(model, TaylorSeerCache(cache_interval=2)), "cache last")
    demo.sample(model, PROMPT, steps=STEPS)
    (report,) = reports.all
    assert report.count("forecast", "reused") >= 6
    assert not report.notes


@pytest.mark.parametrize("order", ["cache last", "cache first"])
@by_door
def test_off_is_off_beside_another_cache(demo, cached, theirs, order, door):
    def all_off(model):
        for strategy in OFF:
            model = cached(model, strategy)
        return model

    latent = demo.sample(both(demo, OtherCache(), door, all_off, order), PROMPT, steps=STEPS)
    assert len(OFF) >= 4 and torch.equal(latent, theirs(door))


class LeftBehind(OtherCache):
    """Its node was removed, it stays: every second step is answered, the first one with what the last run left."""

    def __init__(self):
        self.step, self.answered, self.stored = -1, [], getattr(self, "stored", {})

    def answers(self):
        does = bool(self.stored) and self.step % 2 == 0
        if does and self.step not in self.answered:
            self.answered.append(self.step)
        return does


@pytest.mark.parametrize("name", [name for name in WHOLE if "TaylorSeer" in name])
def test_a_cache_that_answers_the_very_first_call_is_seen_by_the_third(demo, cached, reports, name):
    put, latents = DOORS["the network's forward"], []
    for other, caching in ((LeftBehind(), lambda model: model), (LeftBehind(), lambda m: cached(m, WHOLE[name]))):
        demo.sample(put(other, demo.model()), PROMPT, steps=STEPS)
        latents.append(demo.sample(caching(put(other, demo.model())), PROMPT, steps=STEPS))
        assert other.answered == [*range(0, STEPS, 2)]
    (report,) = reports.all
    assert [note for note in report.notes if "another node answers model calls" in note], report.notes
    assert {call.action for call in report.calls} == {"computed"}
    assert torch.allclose(*latents, atol=1e-4)


LATE, PROMPTS = 12, [*PROMPT, "a small blue ball at the left on a green background"]


def added(x, stored):
    return x + 0 * stored + stored - x  # what it keeps has more rows than there are


def of_all_rows(x, stored):
    return torch.stack([stored[row] + 0 * x[row] for row in range(len(stored))])


def as_it_is(x, stored):
    return stored.clone()


def of_the_first_rows(x, stored):
    return stored[: len(x)].clone()


HOW = {
    "fails by size": added,
    "fails by index": of_all_rows,
    "answers with a wrong batch": as_it_is,
    "answers with the other prompt": of_the_first_rows,
}
by_how = pytest.mark.parametrize("how", HOW)


class OneForBoth(OtherCache):
    """Keeps one output for all prompts of a call, and begins when the negative one is left out at times.

    It computes where the call's rows are others than before, but in the steps in which it answers.
    """

    first = LATE

    def __init__(self):
        super().__init__()
        self.rows = []  # of all calls

    def answers(self):
        does = self.step > self.first and self.step % 4 != 0
        if does and self.step not in self.answered:
            self.answered.append(self.step)
        return does

    def put_on(self, model, how, kind="DIFFUSION_MODEL"):
        def around(executor, x, *args, **kwargs):
            self.rows.append((self.step, len(x)))
            if self.answers():
                return HOW[how](x, self.stored[None])
            return self.instead(lambda: executor(x, *args, **kwargs))

        return self.on(model, {kind: around})


def beside(other, demo, cached, how, order, strategy=PUBLISHED, **options):
    model = demo.model()
    if order == "cache last":
        model = cached(other.put_on(model, how, **options), strategy)
    else:
        model = other.put_on(cached(model, strategy), how, **options)
    return demo.sample(model, PROMPTS, steps=STEPS)


def left_out(report):
    """The steps in which the negative prompt was estimated."""
    return [call.step.index for call in report.calls if call.action == "reused" and call.branches == ("negative",)]


@pytest.fixture(scope="module")
def for_both(demo):
    """The latent with such a cache and no cache of ours."""
    other = OneForBoth()
    latent = demo.sample(other.put_on(demo.model(), "fails by size"), PROMPTS, steps=STEPS)
    assert other.answered == [13, 14, 15, 17, 18, 19]
    return latent


@pytest.mark.parametrize("kind", ["DIFFUSION_MODEL", "APPLY_MODEL"])
@pytest.mark.parametrize("order", ["cache last", "cache first"])
@by_how
def test_both_prompts_run_once_another_cache_mistakes_one_for_both(demo, cached, reports, for_both, how, order, kind):
    """In step 12 both run and it keeps what they gave; step 13 is the first that it answers, with one left out."""
    other = OneForBoth()
    latent = beside(other, demo, cached, how, order, kind=kind)
    (report,) = reports.all
    assert left_out(report) == [8, 9, 10, 11]
    assert other.answered == [13, 14, 15, 17, 18, 19]
    assert [rows for step, rows in other.rows if step == 13] == [2, 4]  # once more, with both
    assert [rows for step, rows in other.rows if step > 13] == [4] * 6
    told = [note for note in report.notes if note.startswith("the negative prompt runs in every step from here on")]
    assert told, report.notes
    assert (latent - for_both).norm() < 0.065 * for_both.norm()


@pytest.mark.parametrize("order", ["cache last", "cache first"])
def test_both_prompts_run_where_another_cache_keeps_what_one_gave(demo, cached, reports, order):
    """It keeps what it was given in step 11, with one prompt, and answers step 12, in which both are due."""
    other = OneForBoth()
    other.first = LATE - 1
    other.answers = lambda: other.step == LATE
    latent = beside(other, demo, cached, "fails by size", order)
    (report,) = reports.all
    assert left_out(report) == [8, 9, 10, 11]
    assert [rows for step, rows in other.rows if step == LATE] == [4, 2, 2]  # then one by one
    assert [rows for step, rows in other.rows if step > LATE] == [4] * 7
    exact = demo.sample(demo.model(), PROMPTS, steps=STEPS)
    assert (latent - exact).norm() < 0.065 * exact.norm()


@pytest.mark.parametrize("order", ["cache last", "cache first"])
def test_no_prompt_is_left_out_once_another_cache_has_answered(demo, cached, reports, theirs, order):
    """Before the first step that leaves one out."""
    other, put = OtherCache(), "model function wrapper"
    latent = demo.sample(both(demo, other, put, lambda model: cached(model, PUBLISHED), order), PROMPT, steps=STEPS)
    (report,) = reports.all
    assert other.answered[0] == FIRST < 8 and not left_out(report)
    assert [note for note in report.notes if "another node answers model calls" in note], report.notes
    assert (latent - theirs(put)).norm() < 0.065 * theirs(put).norm()


def test_nothing_is_said_of_a_negative_prompt_that_is_not_run(demo, cached, reports):
    other = OtherCache()
    model = cached(DOORS["model function wrapper"](other, demo.model()), PUBLISHED)
    demo.sample(model, PROMPT, steps=STEPS, cfg=1.0)
    (report,) = reports.all
    assert len(other.answered) > 5
    (told,) = [note for note in report.notes if "negative prompt" in note]
    assert told.startswith("where cfg is 1")


def test_a_cache_of_all_predictions_is_asked_again_where_it_gives_too_many(demo, cached, reports):
    """Around ComfyUI's calc_cond_batch, whose answers have no shape but what they are given."""
    from comfy.patcher_extension import WrappersMP

    other, asked = OneForBoth(), []

    def around(executor, model, conds, *args):
        asked.append((other.step, sum(cond is not None for cond in conds)))
        if not other.answers():
            other.stored[None] = executor(model, conds, *args)
            return list(other.stored[None])
        whole = torch.cat(other.stored[None])
        return list(whole.chunk(asked[-1][1])) + [None] * (len(conds) - asked[-1][1])

    model = cached(demo.model(), PUBLISHED)
    model = other.on(model, {})
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "its cache", around)
    latent = demo.sample(model, PROMPTS, steps=STEPS)
    (report,) = reports.all
    assert left_out(report) == [8, 9, 10, 11] and [count for step, count in asked if step == 13] == [1, 2]
    assert latent.isfinite().all()


class Failing(OneForBoth):
    """Raises this in the first call with one prompt."""

    def __init__(self, *errors):
        super().__init__()
        self.errors = list(errors) or getattr(self, "errors", [])  # a run begins with what there is

    def put_on(self, model, how, **_):
        def around(executor, x, *args, **kwargs):
            self.rows.append((self.step, len(x)))
            if self.errors and (len(x) == 2 or len(self.errors) == 1 < len(self.rows)) and self.step > 8:
                raise self.errors.pop(0)
            return executor(x, *args, **kwargs)

        return self.on(model, {"DIFFUSION_MODEL": around})


def test_a_cancel_in_a_call_with_one_prompt_cancels(comfy, demo, cached, reports):
    cancel = comfy.model_management.InterruptProcessingException
    other = Failing(cancel())
    with pytest.raises(cancel):
        beside(other, demo, cached, "", "cache last")
    assert other.rows[-1] == (9, 2) and not reports.all


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["GPU", "CPU"],
)
def test_memory_that_runs_out_in_a_call_with_one_prompt_is_given_back(demo, cached, reports, error):
    other = Failing(error())
    latent = beside(other, demo, cached, "", "cache last")
    (report,) = reports.all
    assert left_out(report) == [8, 9]  # the call of step 9 was made again alone, with nothing kept
    assert [rows for step, rows in other.rows if step > 8] == [2, 2, *[4] * 10]
    assert [note for note in report.notes if note.startswith("memory ran out")]
    assert not [note for note in report.notes if "leaving it out" in note]
    assert latent.isfinite().all()


def test_a_failure_of_the_device_is_not_asked_again(demo, cached):
    other = Failing(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        beside(other, demo, cached, "", "cache last")
    assert other.rows[-1] == (9, 2)


def test_what_fails_with_both_prompts_too_is_raised_as_it_was_the_second_time(demo, cached):
    other = Failing(ValueError("with one"), KeyError("with both"))
    with pytest.raises(KeyError, match="with both") as raised:
        beside(other, demo, cached, "", "cache last")
    assert other.rows[-2:] == [(9, 2), (9, 4)]
    assert raised.value.__context__ is None
