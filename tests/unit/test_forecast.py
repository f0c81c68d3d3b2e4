"""Forecasts: where the weights come from, and the sums they weigh."""

from math import comb, factorial, hypot

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cache_core.strategy.forecast import (
    WEIGHT_LIMIT,
    History,
    newton_weights,
    recursion_weights,
    safe_weights,
    safe_weights_on_device,
    weighted_sum,
)
from cache_core.strategy.packed import packed

few = settings(max_examples=60, deadline=None)  # a busy machine must not fail a test
falling_nodes = st.lists(st.floats(0.02, 0.5), min_size=1, max_size=4).map(
    lambda gaps: [sum(gaps[: number + 1]) for number in range(len(gaps))]  # newest first, the others noisier
)


@pytest.mark.parametrize("degree", range(4))
def test_newton_is_exact_on_a_polynomial_at_uneven_nodes(degree):
    nodes = [0.3, 0.37, 0.61, 0.95][: degree + 1]
    weights = newton_weights(nodes, 0.11)
    values = [(2 * node - 1) ** degree + node for node in nodes]
    expected = (2 * 0.11 - 1) ** degree + 0.11 if degree else 1 + nodes[0]
    assert sum(map(float.__mul__, weights, values)) == pytest.approx(expected)


@few
@given(falling_nodes, st.floats(-1, 3))
def test_newton_weights_add_up_to_one(nodes, at):
    weights = newton_weights(nodes, at)
    assert sum(weights) == pytest.approx(1, abs=1e-9 * (1 + max(map(abs, weights))))


def test_newton_at_a_node_is_that_node():
    assert newton_weights([0.2, 0.5, 0.9], 0.5) == [0, 1, 0]


def test_the_order_drops_where_weights_are_larger_than_the_limit():
    nodes = [0.5, 0.6, 0.7]
    assert len(safe_weights(nodes, 0.49, order=2)) == 3
    assert len(safe_weights(nodes, 0.4, order=2)) == 2  # three nodes: 3, -3, 1
    assert safe_weights(nodes, 0.2, order=2) == [1.0]  # two nodes: 4, -3


@few
@given(falling_nodes, st.floats(-1, 2), st.integers(0, 3))
def test_safe_weights_are_within_the_limit_and_as_many_as_it_allows(nodes, at, order):
    weights = safe_weights(nodes, at, order)
    assert hypot(*weights) <= WEIGHT_LIMIT
    larger = range(len(weights) + 1, min(order + 1, len(nodes)) + 1)
    assert all(hypot(*newton_weights(nodes[:count], at)) > WEIGHT_LIMIT for count in larger)


@few
@given(falling_nodes, st.floats(-1, 2), st.integers(0, 3))
def test_weights_on_the_device_are_the_same(nodes, at, order):
    norms = [hypot(*newton_weights(nodes[:count], at)) for count in range(2, min(order + 1, len(nodes)) + 1)]
    assume(all(abs(norm - WEIGHT_LIMIT) > 1e-3 for norm in norms))  # float32 may decide otherwise at the very limit
    on_device = torch.stack(safe_weights_on_device(nodes, torch.tensor(at), order))
    expected = safe_weights(nodes, at, order)
    expected += [0.0] * (len(on_device) - len(expected))
    torch.testing.assert_close(on_device, torch.tensor(expected), rtol=1e-4, atol=1e-4)  # float32, nodes 0.02 apart


def test_weights_on_the_device_without_a_node_are_no_error():
    assert len(safe_weights_on_device([], torch.tensor(0.5), 1)) == 1


def published_recursion(values, nodes, at, order):
    """TaylorSeer as published, written down anew: factors oldest first, each from the one before."""
    factors = []
    for index, (node, value) in enumerate(zip(reversed(nodes), reversed(values), strict=True)):
        updated, gap = [value], node - list(reversed(nodes))[index - 1] if index else None
        for known in factors[:order]:
            updated.append((updated[-1] - known) / gap)
        factors = updated
    return sum(factor * (at - nodes[0]) ** i / factorial(i) for i, factor in enumerate(factors))


@few
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 3),
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
)
def test_recursion_weights_are_the_published_recursion(gaps, ahead, order, values):
    nodes = [float(sum(gaps[number:])) for number in range(len(gaps))]  # step indices, newest first
    values, at = values[: len(nodes)], nodes[0] + ahead
    weights = recursion_weights(nodes, at, order)
    forecast = sum(map(float.__mul__, weights, values))
    size = sum(abs(weight) for weight in weights) * 5
    assert forecast == pytest.approx(published_recursion(values, nodes, at, order), abs=1e-9 * (1 + size))


def test_the_recursion_is_newtons_up_to_order_one():
    assert recursion_weights([7.0, 4.0], 9.0, 1) == pytest.approx(newton_weights([7.0, 4.0], 9.0))


def test_the_recursion_at_even_steps_is_a_taylor_series_of_differences():
    weights = recursion_weights([2.0, 1.0, 0.0], 3.0, 2)
    differences = [[1, 0, 0], [1, -1, 0], [1, -comb(2, 1), 1]]
    assert weights == pytest.approx([sum(d[i] / factorial(n) for n, d in enumerate(differences)) for i in range(3)])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_sums_are_accumulated_in_float32_and_rounded_once(stored, on_device):
    tensors = [torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(stored) for seed in range(3)]
    numbers = [2.25, -2.0, 0.75]
    weights = [torch.tensor(number) for number in numbers] if on_device else numbers
    expected = sum(tensor.double() * number for tensor, number in zip(tensors, numbers, strict=True))
    assert torch.equal(weighted_sum(tensors, weights, stored), expected.to(stored))


@pytest.mark.parametrize("on_device", [False, True])
def test_float64_stays_float64(on_device):
    tensors = [torch.full((2,), 1e-12, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    weights = [torch.tensor(1.0), torch.tensor(1.0)] if on_device else [1.0, 1.0]
    assert weighted_sum(tensors, weights, torch.float64).dtype is torch.float64
    assert torch.equal(weighted_sum(tensors, weights, torch.float64), 1 + tensors[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_a_new_tensor_and_leaves_its_parts_alone(dtype):
    part = torch.ones(4, dtype=dtype)
    weighted_sum([part], [1.0], dtype).zero_()
    assert torch.equal(part, torch.ones(4, dtype=dtype))


def filled(*nodes, capacity=2):
    history = History(capacity)
    for node in nodes:
        history.add(node, (torch.full((2, 3), node),))
    return history


def test_the_history_is_newest_first_and_no_longer_than_its_capacity():
    history = filled(0.9, 0.7, 0.6)
    assert history.nodes == [0.6, 0.7]
    assert len(history) == 2
    assert [features[0][0, 0].item() for features in history.features] == pytest.approx([0.6, 0.7])


def test_a_value_at_the_same_node_replaces_the_old_one():
    history = filled(0.9, 0.7)
    history.add(0.7 * (1 + 1e-7), (torch.full((2, 3), 5.0),))
    assert history.nodes == pytest.approx([0.7, 0.9])
    assert history.features[0][0][0, 0] == 5


def test_node_zero_is_a_node_like_any_other():
    history = filled(0.0, 0.0)
    assert history.nodes == [0.0]


def test_other_shapes_start_the_history_anew():
    history = filled(0.9, 0.7)
    history.add(0.5, (torch.zeros(2, 4),))
    assert history.nodes == [0.5]
    history.add(0.4, (torch.zeros(2, 4), torch.zeros(2, 4)))
    assert history.nodes == [0.4]


def test_the_history_gives_back_the_dtype_of_what_was_kept_in_fewer_bits():
    history = History(2)
    for node in (0.9, 0.7):
        history.add(node, (packed(torch.full((2, 3), node), torch.bfloat16),))
    assert {features[0].parts[0].dtype for features in history.features} == {torch.bfloat16}
    (combined,) = history.combined([2.0, -1.0])
    assert combined.dtype is torch.float32 and torch.allclose(combined, torch.full((2, 3), 0.5), rtol=2e-2)


def test_a_history_of_polynomial_values_forecasts_them_exactly():
    history = History(3)
    for node in (0.9, 0.65, 0.5):
        history.add(node, (torch.full((2,), node**2, dtype=torch.float64),))
    (forecast,) = history.combined(newton_weights(history.nodes, 0.4))
    torch.testing.assert_close(forecast, torch.full((2,), 0.16, dtype=torch.float64))


def test_features_of_several_dtypes_keep_their_own():
    history = History(1)
    history.add(0.5, (torch.ones(2), torch.ones(2, dtype=torch.bfloat16)))
    assert [feature.dtype for feature in history.combined([1.0])] == [torch.float32, torch.bfloat16]
