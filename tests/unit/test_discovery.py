"""BlockPlan: which lists of a model are chains of blocks, learned by watching one ordinary call."""

import pytest
import torch
from torch import nn
from toy import POSITIVE, C, ReuseAlways, Sampling, Toy, first_latent, relative_error, sigmas_of, traces_on

from cache_core.model.hooks import HookRegistry
from cache_core.model.lesson import Lesson
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache


def learned(model, *inputs):
    lesson = Lesson(model, {})
    with HookRegistry(lesson.watching()):
        model(*inputs)
    return lesson.plan()


class Model(nn.Module):
    """A model whose forward is the function it is given, over attributes it is given. Called as the toy is."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.own_forward = forward
        for name, module in modules.items():
            self.add_module(name, module)
        self.requires_grad_(False)

    def forward(self, latent, sigma=None, text=None, control=None):
        return self.own_forward(self, latent)


class Block(nn.Module):
    """A linear layer behind a return value of any form."""

    def __init__(self, call=lambda layer, x: layer(x), width=C):
        super().__init__()
        self.layer, self.call, self.runs = nn.Linear(width, width), call, 0

    def forward(self, *args, **kwargs):
        self.runs += 1
        return self.call(self.layer, *args, **kwargs)


def blocks(count=3, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleList(Block(**settings) for _ in range(count))


def in_turn(chain, x):
    for block in chain:
        x = block(x)
    return x


def runs_in(model):
    return sum(module.runs for module in model.modules() if isinstance(module, Block))


def replay_error(model):
    """Error of a reused call against the computed one of the same inputs; asserts that no block ran for it."""
    sampling, before = Sampling(model, (ReuseAlways(),), branches=(POSITIVE,)), runs_in(model)
    outputs = [sampling.call_on(first_latent(), index) for index in range(3)]
    assert sampling.report.calls[-1].action == "reused"
    assert runs_in(model) - before == sum(isinstance(module, Block) for module in model.modules())
    return relative_error(outputs[2], outputs[0])


def test_the_toy_has_two_chains(toy):
    latent = first_latent()
    plan = learned(toy, latent, torch.ones(1), latent)
    assert str(plan) == "2 double_blocks + 3 single_blocks"
    assert [len(chain.ends) for chain in plan.chains] == [2, 1]
    assert plan.chains[0].names == ("double_blocks.0", "double_blocks.1")
    assert not plan.notes


def test_watching_changes_nothing_and_leaves_nothing(toy):
    latent = first_latent()
    lesson = Lesson(toy, {})
    with HookRegistry(lesson.watching()):
        output = toy(latent, torch.ones(1), latent)
    assert torch.equal(output, Toy()(latent, torch.ones(1), latent))
    assert traces_on(toy) == []


def test_the_image_is_the_main_stream(toy):
    latent = first_latent(tokens=9)
    chain = learned(toy, latent, torch.ones(1), first_latent(tokens=5)).chains[0]
    kwargs = {"img": torch.zeros(1, 9, 16), "txt": torch.zeros(1, 5, 16), "vec": torch.zeros(1, 1, 16)}
    assert chain.wirings[0].streams_in((), kwargs)[chain.main] is kwargs["img"]


def tuple_stream(layer, streams, scale):
    image, text = streams
    return layer(image) * scale, layer(text)


def keywords(layer, *, hidden_states, encoder_hidden_states, scale=1.0):
    return {"encoder": layer(encoder_hidden_states), "hidden": layer(hidden_states)}


def through_tuples(model, x):
    streams = (x, x[:, :3])
    for block in model.blocks:
        streams = block(streams, 0.5)
    return streams[0] + streams[1].mean(1, keepdim=True)


def through_keywords(model, x):
    text = x[:, :3]
    for block in model.blocks:
        output = block(hidden_states=x, encoder_hidden_states=text)
        x, text = output["hidden"] + 1, output["encoder"]
    return x + text.mean(1, keepdim=True)


def with_added_signal(model, x):
    for block in model.blocks:
        x = block(x) + 1  # a new tensor between the blocks
    return x


def with_long_skips(model, x):
    skips = []
    for number, block in enumerate(model.blocks):
        x = block(x, skips.pop() if number >= 2 else None)
        skips.append(x)
    return x


def taking_skip(layer, x, skip):
    return layer(x if skip is None else x + skip)


FLOWS = {
    "tuple-streams": (through_tuples, tuple_stream),
    "keywords-and-dicts": (through_keywords, keywords),
    "new-tensors-between": (with_added_signal, lambda layer, x: layer(x)),
    "long-skips": (with_long_skips, taking_skip),
    "lists": (lambda model, x: in_list(model, x), lambda layer, x: [layer(x)]),
    "a-number-beside": (lambda model, x: in_list(model, x), lambda layer, x: (layer(x), 7, None)),
}


def in_list(model, x):
    for block in model.blocks:
        x = block(x)[0]
    return x


@pytest.mark.parametrize(("flow", "call"), FLOWS.values(), ids=FLOWS)
def test_streams_are_followed_through(flow, call):
    model = Model(flow, blocks=blocks(4, call=call))
    assert learned(model, first_latent()).block_count == 4
    assert replay_error(model) <= 1e-6  # anchor + (output - anchor) rounds twice in float32


class LastDropsText(nn.Module):
    """Stable Diffusion 3's blocks: the last returns None for the text."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.joint_blocks = nn.ModuleList(Block(self.joint) for _ in range(3))
        self.joint_blocks[2].call = lambda layer, context, x: (None, layer(x) + context.mean(1, keepdim=True))
        self.requires_grad_(False)

    @staticmethod
    def joint(layer, context, x):
        return layer(context), layer(x) + context.mean(1, keepdim=True)

    def forward(self, latent, sigma=None, text=None, control=None):
        context = latent[:, :4]
        for block in self.joint_blocks:
            context, latent = block(context, latent)
        return latent


def test_a_last_block_that_returns_none_for_the_text():
    model = LastDropsText()
    (chain,) = learned(model, first_latent()).chains
    assert len(chain.wirings[0].gives) == 2
    assert len(chain.ends) == 1
    assert replay_error(model) <= 1e-6


def test_a_module_dict_is_a_chain():
    named = nn.ModuleDict({"first": Block(), "second": Block()})
    model = Model(lambda model, x: in_turn(model.layers.values(), x), layers=named)
    assert learned(model, first_latent()).chains[0].names == ("layers.first", "layers.second")
    assert replay_error(model) <= 1e-6


@pytest.mark.parametrize("flow", ["tuple-streams", "keywords-and-dicts", "new-tensors-between", "lists"])
def test_a_single_block_is_a_chain(flow):
    forward, call = FLOWS[flow]
    model = Model(forward, blocks=blocks(1, call=call))
    assert str(learned(model, first_latent())) == "1 blocks"
    assert replay_error(model) <= 1e-6


@pytest.mark.parametrize("call", [lambda layer, x: layer(x)[:, ::2], lambda layer, x: layer(x).double()])
def test_a_single_block_that_returns_another_kind_of_tensor_is_no_chain(call):
    assert learned(Model(lambda model, x: model.blocks[0](x), blocks=blocks(1, call=call)), first_latent()).chains == ()


def collected(model, x):
    """As a ControlNet's zero convolutions: each takes another tensor of one shape, and each output counts."""
    return sum(block(x * (number + 1)) for number, block in enumerate(model.blocks))


def returning_features(layer, x):
    return layer(x), layer(x)[:, :2]


ALWAYS_RUN = {
    "called-twice": (lambda model, x: in_turn(model.blocks, in_turn(model.blocks, x)), {}, "once, in order"),
    "backwards": (lambda model, x: in_turn(reversed(model.blocks), x), {}, "once, in order"),
    "only-some": (lambda model, x: in_turn(model.blocks[:2], x), {}, "once, in order"),
    "side-by-side": (lambda model, x: sum(block(x) for block in model.blocks), {}, "do not feed each other"),
    "collected": (lambda model, x: collected(model, x), {}, "do not feed each other"),
}


@pytest.mark.parametrize("name", [name for name in ALWAYS_RUN if name != "collected"])
def test_a_list_that_is_no_chain_always_runs_and_the_plan_says_why(name):
    flow, settings, why = ALWAYS_RUN[name]
    model = Model(flow, blocks=blocks(**settings))
    plan = learned(model, first_latent())
    assert plan.chains == ()
    assert any("blocks always runs" in note and why in note for note in plan.notes)


def test_blocks_may_return_more_than_they_pass_on(toy):
    """As Wan's VACE blocks do, whose hints are added to the main blocks: what these then return does not count."""
    model = Model(in_list, blocks=blocks(call=returning_features))
    plan = learned(model, first_latent())
    assert plan.chains[0].has_extras
    sampling = Sampling(model, (ReuseAlways(),), branches=(POSITIVE,))
    outputs = [sampling.call_on(first_latent(), index) for index in range(3)]
    assert sampling.report.count("reused") == 2
    torch.testing.assert_close(outputs[2], outputs[0])


def test_a_list_that_only_looks_like_a_chain_is_found_out_by_the_rehearsal():
    flow, settings, _ = ALWAYS_RUN["collected"]
    model = Model(flow, blocks=blocks(**settings))
    sampling = Sampling(model, (ReuseAlways(),), branches=(POSITIVE,))
    for index in range(3):
        sampling.call_on(first_latent(), index)
    assert learned(model, first_latent()).chains
    assert any("could not be read" in note for note in sampling.report.notes)


@pytest.mark.parametrize(("flow", "settings", "why"), ALWAYS_RUN.values(), ids=ALWAYS_RUN)
@pytest.mark.parametrize("level", ["model", "block"])
def test_a_list_that_is_no_chain_gives_what_it_gave(flow, settings, why, level):
    sampling = Sampling(Model(flow, blocks=blocks(**settings)), (ReuseAlways(level),), branches=(POSITIVE,))
    outputs = [sampling.call_on(first_latent(), index) for index in range(3)]
    assert relative_error(outputs[2], outputs[0]) <= 1e-6


def using_every_output(model, x):
    collected = []
    for block in model.blocks:
        x = block(x)
        collected.append(x)
    return sum(collected)


def test_a_head_that_uses_what_left_the_blocks_between_gives_what_it_gave():
    sampling = Sampling(Model(using_every_output, blocks=blocks()), (ReuseAlways(),), branches=(POSITIVE,))
    outputs = [sampling.call_on(first_latent(), index) for index in range(3)]
    assert relative_error(outputs[2], outputs[0]) <= 1e-6


def shrinking(layer, x):
    return layer(x)[:, ::2]


def test_blocks_that_change_the_shape_are_no_chain():
    plan = learned(Model(lambda model, x: in_turn(model.blocks, x), blocks=blocks(call=shrinking)), first_latent())
    assert plan.chains == ()


def test_a_list_inside_a_block_is_no_chain_of_its_own():
    inner = [blocks(2) for _ in range(3)]
    outer = nn.ModuleList(Model(lambda model, x: in_turn(model.layers, x), layers=layers) for layers in inner)
    plan = learned(Model(lambda model, x: in_turn(model.blocks, x), blocks=outer), first_latent())
    assert str(plan) == "3 blocks"
    assert plan.notes == ()


def test_a_small_chain_stays_live():
    refiners, large = blocks(2), blocks(3, width=16)
    widen = nn.Linear(C, 16)
    model = Model(
        lambda model, x: in_turn(model.blocks, model.widen(in_turn(model.refiners, x))),
        refiners=refiners, widen=widen, blocks=large,
    )  # fmt: skip
    plan = learned(model, first_latent())
    assert str(plan) == "3 blocks"
    assert "refiners always runs: it is small" in plan.notes
    sampling = Sampling(model, (ReuseAlways(),), branches=(POSITIVE,))
    before = [block.runs for block in refiners]
    for index in range(3):
        sampling.call_on(first_latent(), index)
    assert [block.runs - runs for block, runs in zip(refiners, before, strict=True)] == [4, 4]  # 3 calls, 1 rehearsal


UNUSABLE = {
    "of-different-classes": nn.ModuleList([Block(), nn.Linear(C, C)]),
    "without-weights": nn.ModuleList([nn.Identity(), nn.Identity()]),
    "never-called": None,
}


@pytest.mark.parametrize("unusable", UNUSABLE.values(), ids=UNUSABLE)
def test_other_lists_are_no_chains(unusable):
    model = Model(lambda model, x: in_turn(unusable or (), x), blocks=unusable or blocks())
    assert learned(model, first_latent()).chains == ()


def test_two_streams_of_one_shape_are_told_apart_by_identity():
    def swap_free(model, x):
        image, text = x, x.flip(1)
        for block in model.blocks:
            image, text = block(text, image)
        return image - 2 * text

    model = Model(swap_free, blocks=blocks(call=lambda layer, text, image: (layer(image), layer(text) + image)))
    assert learned(model, first_latent()).block_count in (0, 3)  # followed right, or not at all
    sampling = Sampling(model, (ReuseAlways(),), branches=(POSITIVE,))
    outputs = [sampling.call_on(first_latent(), index) for index in range(3)]
    assert relative_error(outputs[2], outputs[1]) <= 1e-6


class WithoutLists(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.runs, self.layer = 0, nn.Linear(C, C).requires_grad_(False)

    def forward(self, latent, sigma, text, control=None):
        self.runs += 1
        return self.layer(latent) * sigma[:, None, None]


def test_first_block_cache_computes_a_model_without_blocks_and_says_so():
    sampling = Sampling(WithoutLists(), (FirstBlockCache(residual_diff_threshold=1.0),))
    latent = sampling.sample(first_latent())
    assert torch.equal(latent, Sampling(WithoutLists()).sample(first_latent()))
    assert sampling.toy.runs == 12
    assert any("no chain of blocks" in note for note in sampling.report.notes)
    assert "nothing reused" in sampling.report.line()


def test_taylorseer_on_the_stack_falls_back_to_the_output_of_a_model_without_blocks():
    sampling = Sampling(WithoutLists(), (TaylorSeerCache(cache_level="model"),))
    exact = Sampling(WithoutLists()).sample(first_latent())
    assert relative_error(sampling.sample(first_latent()), exact) < 0.02
    assert sampling.toy.runs == sampling.report.count("computed") < 8


@pytest.mark.parametrize("level", ["block", "module"])
def test_a_model_without_blocks_has_nothing_to_reuse_in_them_and_the_report_says_so(level):
    sampling = Sampling(WithoutLists(), (TaylorSeerCache(cache_level=level),))
    assert torch.equal(sampling.sample(first_latent()), Sampling(WithoutLists()).sample(first_latent()))
    assert any("block" in note for note in sampling.report.notes)
    assert not sampling.report.line().endswith("nothing reused: ")


def test_the_first_evaluation_learns_whatever_the_layout(toy):
    sampling = Sampling(toy, (ReuseAlways(),), layout="separate")
    for index in range(3):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent()), index)
    assert [call.reason for call in sampling.report.calls[:2]] == ["learning the model's blocks"] * 2
    assert [call.action for call in sampling.report.calls] == ["computed"] * 2 + ["reused"] * 4


def test_an_output_strategy_needs_no_lesson(toy):
    sampling = Sampling(toy, (ReuseAlways("output"),), sigmas_of(2))
    sampling.sample(first_latent())
    assert toy.runs == 1
    assert sampling.report.blocks == ""


def test_a_lesson_that_fails_is_given_again(toy):
    sampling = Sampling(toy, (ReuseAlways(),))
    latents = dict.fromkeys(sampling.branches, first_latent())
    toy.fails_in_block_three = True
    with pytest.raises(RuntimeError, match="block three"):
        sampling.predict(latents, 0)
    toy.fails_in_block_three = False
    for index in range(3):
        sampling.predict(latents, index)
    assert sampling.report.blocks == "2 double_blocks + 3 single_blocks"
    assert sampling.report.calls[-1].action == "reused"
