"""The examples in the docstrings are tests."""

import doctest
import importlib
import pkgutil

import pytest

import cache_core

MODULES = [
    found.name
    for found in pkgutil.walk_packages(cache_core.__path__, "cache_core.")
    if not found.name.startswith(("cache_core.adapters", "cache_core.demo"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_right(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 2
