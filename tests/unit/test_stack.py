"""The stack of blocks: what stands in for skipped blocks, inside the model's own loop."""

import pytest
import torch
from torch import nn
from toy import IMAGE, NEGATIVE, POSITIVE, C, ReuseAlways, Sampling, Toy, W, first_latent, relative_error, sigmas_of

from cache_core import CacheRun, Schedule
from cache_core.run.stack import ONLY_BLOCK
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

ORDER_ZERO = TaylorSeerCache(
    cache_level="model", max_order=0, cache_interval=9, disable_cache_before_step=2, spacing="steps", few_steps="draft"
)
REPLAY_ERROR = 1e-6  # anchor + (output - anchor) rounds twice in float32
replayed = pytest.mark.parametrize("strategy", [ReuseAlways(), ORDER_ZERO], ids=["reuse-always", "taylorseer-order-0"])


def control_signal():
    return torch.randn(1, IMAGE // 2, W, generator=torch.Generator().manual_seed(5))


def replay(toy, strategy, **settings):
    """Compute, reuse with the same inputs: the output computed, the one reused, how many blocks ran for it."""
    toy.embed_sigma.weight.zero_()  # the steps differ for the strategy, not for the model
    sampling = Sampling(toy, (strategy,), sigmas_of(8), **settings)
    latents = dict.fromkeys(sampling.branches, first_latent())
    computed = torch.cat(list(sampling.predict(latents, 0).values()))
    sampling.predict(latents, 1)  # TaylorSeer's plan computes it too
    before = toy.runs_of("block")
    reused = torch.cat(list(sampling.predict(latents, 2).values()))
    return computed, reused, toy.runs_of("block") - before


@replayed
@pytest.mark.parametrize("control", [None, control_signal()], ids=["plain", "control"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "out-of-place"])
@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_the_same_inputs_give_the_same_output_without_running_a_block(strategy, control, in_place, layout):
    computed, reused, ran = replay(Toy(in_place=in_place), strategy, control=control, layout=layout)
    assert ran == 0
    assert relative_error(reused, computed) <= REPLAY_ERROR


@replayed
def test_a_control_signal_matters_to_the_toy(strategy):
    without, _, _ = replay(Toy(), strategy)
    with_control, _, _ = replay(Toy(), strategy, control=control_signal())
    assert relative_error(with_control, without) > 0.1  # or the test above would prove nothing


@replayed
def test_what_the_model_adds_in_place_does_not_reach_the_embedding(strategy):
    toy = Toy(in_place=False)
    toy.adds_embedding_to_head = True
    computed, reused, ran = replay(toy, strategy, control=control_signal())
    assert ran == 0
    assert relative_error(reused, computed) <= REPLAY_ERROR


class WithoutEmbedding(nn.Module):
    """Works on the latent itself; adds a control signal in place to what its blocks return."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(C, C) for _ in range(3))

    def forward(self, latent, sigma, text, control=None):
        for block in self.blocks:
            latent = block(latent)
            latent += 1
        return latent


def test_what_the_model_adds_in_place_does_not_reach_the_latent():
    model, latent, run = WithoutEmbedding(), first_latent(), CacheRun((ReuseAlways(),), Schedule(sigmas_of(3)))
    for sigma in sigmas_of(3)[:-1]:
        run.begin_evaluation()
        run.call_model(model, lambda: model(latent, None, None), torch.tensor([sigma]), contexts=[POSITIVE])
    assert [call.action for call in run.report.calls] == ["computed", "reused", "reused"]
    assert torch.equal(latent, first_latent())


def test_the_first_block_runs_and_its_residual_is_not_counted_twice(toy):
    strategy = FirstBlockCache(residual_diff_threshold=1.0, max_order=0)
    toy.embed_sigma.weight.mul_(1e-3)  # hardly another input: zero change would compute
    sampling = Sampling(toy, (strategy,), sigmas_of(8), control=control_signal())
    latents = dict.fromkeys(sampling.branches, first_latent())
    outputs = [torch.cat(list(sampling.predict(latents, index).values())) for index in range(3)]
    assert [block.runs for block in toy.blocks] == [3, 1, 1, 1, 1]
    assert relative_error(outputs[2], outputs[0]) < 1e-3  # no more than the inputs differ


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "out-of-place"])
@pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
@pytest.mark.parametrize("doubles", [0, 1], ids=["single", "double"])
def test_a_stack_of_one_block_tests_what_enters_it(in_place, layout, doubles):
    toy = Toy(doubles, 1 - doubles, in_place)
    toy.embed_sigma.weight.mul_(1e-3)  # hardly another input: zero change would compute
    sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=0.1, max_order=0),), layout=layout)
    scales, outputs, rows = (1, 1.001, 1.002, -9, -9.01), [], []
    for index, scale in enumerate(scales):
        before = toy.rows_of("block")
        output = sampling.predict(dict.fromkeys(sampling.branches, first_latent() * scale), index)
        outputs.append(torch.cat(list(output.values())))
        rows.append(toy.rows_of("block") - before)
    assert rows == [2, 0, 0, 2, 0]
    assert ONLY_BLOCK in sampling.report.notes
    assert relative_error(outputs[2], outputs[0]) < 0.01  # no more than the inputs differ
    assert relative_error(outputs[4], outputs[3]) < 0.01
    assert relative_error(outputs[3], outputs[0]) > 0.1


@pytest.mark.parametrize("doubles", [0, 1], ids=["single", "double"])
def test_a_stack_of_one_block_gives_the_same_output_without_running_it(doubles):
    for strategy in (ReuseAlways(), ORDER_ZERO):
        computed, reused, ran = replay(Toy(doubles, 1 - doubles), strategy, control=control_signal())
        assert ran == 0
        assert relative_error(reused, computed) <= REPLAY_ERROR


class Unruly(nn.Module):
    """A model that, when told, runs its blocks unlike the first time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(C, C) for _ in range(4))
        self.requires_grad_(False)
        self.order = [0, 1, 2, 3]
        self.runs = 0

    def forward(self, latent, sigma, text, control=None):
        latent = latent.clone()
        for index in self.order:
            self.runs += 1
            latent = self.blocks[index](latent)
        return latent


UNLIKE = {
    "skips-the-last": [0, 1, 2],
    "skips-the-first": [1, 2, 3],
    "skips-one-between": [0, 2, 3],
    "runs-the-first-twice": [0, 0, 1, 2, 3],
    "runs-one-twice": [0, 1, 1, 2, 3],
    "runs-the-last-twice": [0, 1, 2, 3, 3],
    "turns-around": [3, 2, 1, 0],
    "runs-none": [],
}


@pytest.mark.parametrize("order", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize(
    "strategy", [ReuseAlways(), FirstBlockCache(residual_diff_threshold=1.0)], ids=lambda s: s.title
)
def test_a_call_that_runs_its_blocks_unlike_the_learned_one_is_computed(strategy, order):
    model = Unruly()
    sampling = Sampling(model, (strategy,), branches=(POSITIVE,))
    for index in range(2):
        sampling.call_on(first_latent(), index)
    model.order = order
    output = sampling.call_on(first_latent() + 0.01, 2)
    assert torch.equal(output, model(first_latent() + 0.01, None, None))


def test_a_recomputed_call_is_reported_as_computed_and_noted():
    model = Unruly()
    sampling = Sampling(model, (ReuseAlways(),), branches=(POSITIVE,))
    for index in range(2):
        sampling.call_on(first_latent(), index)
    model.order = UNLIKE["skips-the-last"]
    sampling.call_on(first_latent(), 2)
    assert sampling.report.calls[-1].action == "computed"
    assert any("as learned" in note for note in sampling.report.notes)


@pytest.mark.parametrize("order", UNLIKE.values(), ids=UNLIKE)
def test_an_unlike_call_does_not_spoil_what_was_kept(order):
    model = Unruly()
    sampling = Sampling(model, (ReuseAlways(),), branches=(POSITIVE,))
    computed = [sampling.call_on(first_latent(), index) for index in range(2)][-1]
    model.order = order
    sampling.call_on(first_latent(), 2)
    model.order = [0, 1, 2, 3]
    assert relative_error(sampling.call_on(first_latent(), 3), computed) <= REPLAY_ERROR


def test_a_computed_call_that_runs_a_block_twice_counts_as_computed_in_full():
    model = Unruly()
    sampling = Sampling(model, (ReuseAlways(),), branches=(POSITIVE,))
    sampling.call_on(first_latent(), 0)
    model.order = UNLIKE["runs-the-first-twice"]
    sampling.call_on(first_latent(), 1)
    assert sampling.report.calls[-1].computed_share == 1


@pytest.mark.parametrize(
    "strategy", [ReuseAlways(), FirstBlockCache(residual_diff_threshold=1.0)], ids=lambda s: s.title
)
def test_a_branch_that_always_leaves_the_same_block_out_is_reused(strategy):
    model = Unruly()
    sampling = Sampling(model, (strategy,), branches=(POSITIVE,))
    sampling.call_on(first_latent(), 0)
    model.order = UNLIKE["skips-one-between"]
    computed = [sampling.call_on(first_latent() + 0.01 * index, index) for index in (1, 2, 3)][-1]
    model.runs = 0
    output = sampling.call_on(first_latent() + 0.031, 4)
    assert sampling.report.calls[-1].action in ("reused", "forecast")
    assert relative_error(output, model(first_latent() + 0.031, None, None)) < 0.05
    assert model.runs and not torch.equal(output, computed)


class TwoChains(nn.Module):
    """A first chain that the model may leave out in later calls, as if it had kept the result itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text_blocks = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.image_blocks = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.requires_grad_(False)
        self.refines_text, self.text_sees_latent = True, False

    def forward(self, latent, sigma, text, control=None):
        if self.text_sees_latent:
            text = text + latent.mean()
        if self.refines_text:
            for block in self.text_blocks:
                text = block(text)
        x = latent + text.mean(1, keepdim=True)
        for block in self.image_blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    "strategy", [ReuseAlways(), FirstBlockCache(residual_diff_threshold=1.0)], ids=lambda s: s.title
)
def test_a_model_that_leaves_its_first_chain_out_later_is_computed(strategy):
    model = TwoChains()
    model.text_sees_latent = True
    sampling = Sampling(model, (strategy,), branches=(POSITIVE,))
    for index in range(2):
        sampling.call_on(first_latent(), index)
    assert sampling.report.blocks == "2 text_blocks + 2 image_blocks"
    model.refines_text = False
    output = sampling.call_on(first_latent(), 2)
    assert torch.equal(output, model(first_latent(), None, sampling.texts[POSITIVE]))


def test_a_chain_that_does_not_see_the_latent_does_not_lead():
    """The prompt's encoder would never change, and the picture's blocks would be reused for ever."""
    model = TwoChains()
    sampling = Sampling(model, (FirstBlockCache(residual_diff_threshold=0.1, max_order=0),), branches=(POSITIVE,))
    outputs = [sampling.call_on(first_latent() * scale, index) for index, scale in enumerate((1, 1.001, -40))]
    assert sampling.report.blocks == "2 image_blocks"
    assert "text_blocks always runs: it does not see the latent" in sampling.report.notes
    assert [call.action for call in sampling.report.calls] == ["computed", "reused", "computed"]
    assert torch.equal(outputs[2], model(first_latent() * -40, None, sampling.texts[POSITIVE]))


def test_a_text_refiner_of_few_tokens_does_not_lead():
    """Its first block barely changes, whatever happens to the picture."""
    model = TwoChains()
    sampling = Sampling(model, (FirstBlockCache(residual_diff_threshold=0.1, max_order=0),), branches=(POSITIVE,))
    sampling.texts = {POSITIVE: sampling.texts[POSITIVE][:, :2].clone()}
    for index in range(3):
        sampling.texts[POSITIVE] += 1e-3  # as a time-modulated refiner would see it
        sampling.call_on(first_latent() * (1 if index < 2 else -40), index)
    assert sampling.report.calls[-1].action == "computed"
    assert any("text_blocks always runs" in note for note in sampling.report.notes)


class Alternating(nn.Module):
    """Two lists whose blocks take turns, as in Latte, or as Wan S2V's injectors of sound do."""

    def __init__(self, second_sees_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.ModuleList(nn.Linear(C, C) for _ in range(3))
        self.second = nn.ModuleList(nn.Linear(C, C) for _ in range(3))
        self.requires_grad_(False)
        self.second_sees_first = second_sees_first

    def forward(self, latent, sigma, text, control=None):
        x, hint = latent, text.mean(1, keepdim=True).expand_as(latent)
        for one, other in zip(self.first, self.second):
            x = one(x)
            if self.second_sees_first:
                x = other(x)
            else:
                hint = other(hint)
                x = x + hint
        return x


@pytest.mark.parametrize("second_sees_first", [True, False])
def test_a_list_that_begins_amid_another_is_cached_only_if_it_does_not_depend_on_it(second_sees_first):
    model = Alternating(second_sees_first)
    sampling = Sampling(model, (ReuseAlways(),), branches=(POSITIVE,))
    outputs = [sampling.call_on(first_latent() * scale, index) for index, scale in enumerate((1, 1, 1))]
    assert sampling.report.blocks == ("3 first" if second_sees_first else "3 first + 3 second")
    assert sampling.report.count("reused") == 2
    assert relative_error(outputs[2], outputs[0]) <= 1e-6
    assert any("begins amid" in note for note in sampling.report.notes) == second_sees_first


class Promoting(nn.Module):
    """Its first block turns bfloat16 into float32, as a modulation kept in float32 does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(PromotingBlock() for _ in range(3))
        self.head = nn.Linear(C, C).requires_grad_(False)  # float32

    def forward(self, latent, sigma, text, control=None):
        x = latent.bfloat16()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class PromotingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((C,), 1.1), requires_grad=False)

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("level", ["model", "block"])
def test_blocks_that_change_the_dtype_keep_it_when_reused(level):
    sampling = Sampling(Promoting(), (ReuseAlways(level),), branches=(POSITIVE,))
    computed, *_, reused_output = [sampling.call_on(first_latent(), index) for index in range(4)]
    assert reused_output.dtype is computed.dtype
    assert relative_error(reused_output, computed) < 1e-5  # the head works in float32


class WithMask(nn.Module):
    """Blocks hand on a mask beside the hidden states; the head uses it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(MaskedBlock() for _ in range(3))

    def forward(self, latent, sigma, text, control=None):
        x, mask = latent, text.mean((1, 2), keepdim=True) > -1  # (rows, 1, 1): False for the negative branch
        for block in self.blocks:
            x, mask = block(x, mask)
        return x * mask


class MaskedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C).requires_grad_(False)

    def forward(self, x, mask):
        return self.linear(x), mask.clone()


@pytest.mark.parametrize("level", ["model", "block"])
@pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
def test_a_mask_that_blocks_return_is_the_branches_own(level, layout):
    sampling = Sampling(WithMask(), (ReuseAlways(level),), layout=layout)
    latents = dict.fromkeys(sampling.branches, first_latent())
    outputs = [sampling.predict(latents, index) for index in range(4)]
    for output in outputs:
        torch.testing.assert_close(output[POSITIVE], outputs[0][POSITIVE])
        assert not output[NEGATIVE].any()


class WithOptions(nn.Module):
    """Hands its blocks a dictionary that differs between calls, before the stream that follows it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(BlockWithOptions() for _ in range(3))

    def forward(self, latent, sigma, text, control=None):
        img, txt = latent, text
        for block in self.blocks:
            img, txt = block(img, {"branches": list(range(len(latent)))}, txt=txt)
        return img + txt.mean(1, keepdim=True)


class BlockWithOptions(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C).requires_grad_(False)

    def forward(self, img, options, txt):
        return self.linear(img), self.linear(txt)


@pytest.mark.parametrize("layout", ["joined", "alternating"])
def test_arguments_of_varying_length_do_not_shift_the_streams(layout):
    sampling = Sampling(WithOptions(), (ReuseAlways(),), layout=layout)
    latents = dict.fromkeys(sampling.branches, first_latent())
    outputs = [sampling.predict(latents, index) for index in range(4)]
    torch.testing.assert_close(outputs[3], outputs[0])


class ShufflingKeywords(nn.Module):
    """Names its keywords in another order in every second call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.calls = nn.ModuleList(KeywordBlock() for _ in range(3)), 0

    def forward(self, latent, sigma, text, control=None):
        img, txt = latent, text[:, : latent.shape[1]]
        self.calls += 1
        for block in self.blocks:
            img, txt = block(img=img, txt=txt) if self.calls % 2 else block(txt=txt, img=img)
        return img - 2 * txt.mean(1, keepdim=True)


class KeywordBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C).requires_grad_(False)

    def forward(self, img, txt):
        return self.linear(img), self.linear(txt)


def test_the_order_of_keywords_does_not_swap_the_streams():
    sampling = Sampling(ShufflingKeywords(), (ReuseAlways(),), branches=(POSITIVE,))
    outputs = [sampling.call_on(first_latent(tokens=6), index) for index in range(4)]
    torch.testing.assert_close(torch.stack(outputs), outputs[0].expand(4, -1, -1, -1))


def test_a_model_called_with_gradients_enabled_is_cached_too(toy):
    toy.requires_grad_(True)
    sampling = Sampling(toy, (ReuseAlways(),))
    with torch.enable_grad():
        sampling.sample(first_latent())
    assert sampling.report.count("reused") > 0


def test_what_is_kept_holds_no_graph(toy):
    toy.requires_grad_(True)
    sampling = Sampling(toy, (ReuseAlways("output"),))
    with torch.enable_grad():
        outputs = [sampling.predict(dict.fromkeys(sampling.branches, first_latent()), index) for index in range(2)]
    assert outputs[0][POSITIVE].requires_grad
    assert not outputs[1][POSITIVE].requires_grad


@pytest.mark.parametrize("doubles, singles", [(1, 3), (1, 1), (2, 3)])
def test_a_list_of_one_block_that_leads_is_learned_like_any_other(doubles, singles):
    toy = Toy(doubles, singles)
    sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=0.5),))
    latent, uncached = sampling.sample(first_latent()), Sampling(Toy(doubles, singles)).sample(first_latent())
    reused = sampling.report.count("reused", "forecast")
    assert reused >= 4 and relative_error(latent, uncached) < 0.1
    assert not any("as learned" in note for note in sampling.report.notes)
    assert toy.runs_of("block") < (doubles + singles) * (len(sampling.sigmas) + 2)
