"""HookRegistry: around a module's forward for the length of a `with`, and away again."""

import pytest
import torch
from torch import nn

from cache_core.model.hooks import HookRegistry


def adding(amount):
    return lambda forward, x: forward(x) + amount


def times(factor):
    return lambda forward, x: forward(x) * factor


def registry(module, *arounds):
    hooks = HookRegistry()
    for around in arounds:
        hooks.add(module, around)
    return hooks


def test_a_hook_runs_inside_the_with_and_not_after_it():
    module = nn.Identity()
    with registry(module, adding(1)):
        assert module(1) == 2
    assert module(1) == 1
    assert "forward" not in vars(module)


def test_of_two_hooks_the_one_added_last_runs_first():
    module = nn.Identity()
    with registry(module, adding(1), times(10)):
        assert module(1) == 20  # (1 + 1) * 10: the second is outermost
    assert "forward" not in vars(module)


def test_a_hook_may_skip_the_module():
    module = nn.Linear(2, 2)
    with registry(module, lambda forward, x: "skipped"):
        assert module(torch.ones(2)) == "skipped"


def test_a_hook_passes_positions_and_keywords():
    module = nn.MultiheadAttention(4, 1)
    tokens = torch.ones(2, 4)
    expected = module(tokens, tokens, value=tokens, need_weights=False)[0]
    with registry(module, lambda forward, *args, **kwargs: forward(*args, **kwargs)):
        assert torch.equal(module(tokens, tokens, value=tokens, need_weights=False)[0], expected)


def test_an_exception_in_the_module_leaves_no_trace():
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), registry(module, adding(1)):
        module(torch.ones(3))
    assert "forward" not in vars(module)


def test_an_exception_while_installing_leaves_no_trace():
    module, hooks = nn.Identity(), HookRegistry()
    hooks.add(module, adding(1))
    hooks.add(object(), adding(1))  # has no forward
    with pytest.raises(AttributeError), hooks:
        pass
    assert "forward" not in vars(module)


def test_a_patch_from_before_is_kept_and_runs_inside():
    module = nn.Identity()
    module.forward = theirs = lambda x: x + 5
    with registry(module, times(10)):
        assert module(1) == 60
    assert vars(module)["forward"] is theirs
    assert module(1) == 6


def test_a_patch_put_on_top_meanwhile_survives_and_finds_the_module_behind_it():
    module = nn.Identity()
    with registry(module, times(10)):
        ours = module.forward
        module.forward = theirs = lambda x: ours(x) + 5
        assert module(1) == 15
    assert vars(module)["forward"] is theirs
    assert module(1) == 6


def test_a_patch_between_two_of_our_hooks_survives():
    module = nn.Identity()
    first, second = registry(module, times(10)), registry(module, times(100))
    with first:
        ours = module.forward
        module.forward = theirs = lambda x: ours(x) + 5
        with second:
            assert module(1) == 1500
        assert module(1) == 15
    assert vars(module)["forward"] is theirs
    assert module(1) == 6


def test_a_registry_can_be_used_again():
    module = nn.Identity()
    hooks = registry(module, adding(1))
    for _ in range(3):
        with hooks:
            assert module(1) == 2
        assert module(1) == 1
    assert "forward" not in vars(module)


def test_one_module_in_two_lists_gets_both_hooks():
    module = nn.Identity()
    hooks = HookRegistry()
    for owner in (nn.ModuleList([module]), nn.ModuleList([module])):
        hooks.add(owner[0], adding(1))
    with hooks:
        assert module(1) == 3
    assert "forward" not in vars(module)
